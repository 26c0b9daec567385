"""Keys that a composition's door shows at its experts': who may have them used."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.apps.serve.gateway_app import serving_config
from antiphon.coe.serving.app import CoeConfig, run_coe
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon.gateway.config import BoundPorts

HEAD = {"apiVersion": "serving.antiphon.dev/v1alpha1"}
KEYED = {"name": "hosted", "external": {"url": "http://127.0.0.1:1/v1", "model": "m", "apiKeyEnv": "HOSTED_KEY"}}
REFERRED = {"name": "chat", "deploymentRef": "chat"}


def composition(*experts: dict[str, Any], **router: Any) -> CompositionOfExperts:
    return CompositionOfExperts.model_validate(
        {
            **HEAD,
            "kind": "CompositionOfExperts",
            "metadata": {"name": "team"},
            "spec": {"experts": list(experts), "general": experts[0]["name"], "router": router},
        }
    )


def starts(config: CoeConfig) -> bool:
    """Open the doors, and close them again; whether they were open."""
    has_opened = False

    async def run() -> None:
        stop = asyncio.Event()

        def opened(_ports: BoundPorts) -> None:
            nonlocal has_opened
            has_opened = True
            stop.set()

        async with asyncio.timeout(30):
            await run_coe(config, stop, on_bound=opened)

    asyncio.run(run())
    return has_opened


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_KEY", "sk-of-who-pays")


def test_a_router_without_keys_does_not_start_with_keys_of_its_experts() -> None:
    keyed = ExternalEndpoint(url="http://127.0.0.1:1/v1", model="m", api_key_env="HOSTED_KEY")
    for document, endpoints in ((composition(KEYED), {}), (composition(REFERRED), {"chat": keyed})):
        config = CoeConfig(documents=(document,), endpoints=endpoints, http_port=0, grpc_port=0)
        with pytest.raises(InvalidInput, match=r"spec\.experts\[0\].*HOSTED_KEY.*spec\.router\.lendsExpertKeys") as error:
            starts(config)
        assert error.value.field == "spec.router.lendsExpertKeys"
        assert "sk-of" not in str(error.value)


def test_it_starts_with_keys_of_its_own_or_where_its_document_lends_them_or_there_is_nothing_to_lend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert starts(CoeConfig(documents=(composition(KEYED),), http_port=0, grpc_port=0, api_keys=frozenset({"mine"})))
    assert starts(CoeConfig(documents=(composition(KEYED, lendsExpertKeys=True),), http_port=0, grpc_port=0))
    monkeypatch.delenv("HOSTED_KEY")
    assert starts(CoeConfig(documents=(composition(KEYED),), http_port=0, grpc_port=0))


def serving(*, endpoint: dict[str, Any], **router: Any) -> Serving:
    deployment = LLMDeployment.model_validate(
        {
            **HEAD,
            "kind": "LLMDeployment",
            "metadata": {"name": "chat"},
            "spec": {"model": {"uri": "/m"}, "pools": [{"name": "m", "role": "monolith"}], "endpoint": endpoint},
        }
    )
    made = serving_of([deployment, composition(REFERRED, KEYED, **router)], "test")
    return replace(made, checkpoints={"chat": "/m"})


def test_a_gateway_without_keys_does_not_lend_them_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.experts\[1\].*lendsExpertKeys"):
        serving_config(serving(endpoint={}), drain_s=1.0)
    assert not serving_config(serving(endpoint={}, lendsExpertKeys=True), drain_s=1.0).api_keys
    monkeypatch.setenv("DOOR_KEYS", "mine")
    assert serving_config(serving(endpoint={"apiKeysEnv": "DOOR_KEYS"}), drain_s=1.0).api_keys == {"mine"}
