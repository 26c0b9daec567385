"""What documents may ask of devices, as `antiphon validate`, the operator and serving see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from antiphon.apps.serve.deployment_set import serving_of
from antiphon.cli.validate import app
from antiphon.core.device import device_problems, memory_share
from antiphon.core.document.loading import parse_documents
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import SpecInvalid
from antiphon_operator.reconcile.llm.accept import Refused, accept
from antiphon_operator.render.settings import Runtime

RUNTIME = Runtime(image="x", ray_version="2.60.0")


def document(*pools: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"uri": "/m", **model},
            "topology": "afd",
            "pools": [{"name": pool["role"], **pool} for pool in pools],
        },
    }


def problems(*pools: dict[str, Any], **model: Any) -> dict[str, str]:
    return dict(device_problems(LLMDeployment.model_validate(document(*pools, **model)).spec))


ATTENTION: dict[str, Any] = {"role": "attention"}
CARD: dict[str, Any] = {"role": "ffn", "resources": {"gpu": 1}}


def test_a_pool_computes_on_the_card_that_it_reserves() -> None:
    spec = LLMDeployment.model_validate(document(ATTENTION, CARD)).spec
    assert [pool.worker_device for pool in spec.pools] == ["cpu", "cuda"]
    assert not list(device_problems(spec))
    assert memory_share(spec.pools[1]) == 0.9


@pytest.mark.parametrize(
    ("pool", "path", "says"),
    [
        ({"role": "ffn", "resources": {"gpu": 2}}, "pools[1].resources.gpu", "a worker computes on one card"),
        ({"role": "ffn", "device": "cuda"}, "pools[1].device", "needs resources.gpu: 1"),
        ({"role": "ffn", "device": "cpu", "resources": {"gpu": 1}}, "pools[1].device", "idle"),
        ({"role": "ffn", "resources": {"gpuMemoryUtilization": 0.5}}, "pools[1].resources.gpuMemoryUtilization", "has no card"),
    ],
)
def test_what_no_worker_can_do_is_refused_with_its_field(pool: dict[str, Any], path: str, says: str) -> None:
    found = problems(ATTENTION, pool)
    assert list(found) == [path]
    assert says in found[path]


def test_int8_weights_and_cards_do_not_meet_in_one_pool() -> None:
    assert "model.quantization" in problems(ATTENTION, CARD, quantization="int8")
    assert not problems({**ATTENTION, "resources": {"gpu": 1}}, {"role": "ffn"}, quantization="int8")


def test_validate_the_operator_and_serving_say_the_same() -> None:
    value = document(ATTENTION, {"role": "ffn", "resources": {"gpu": 2}})
    with pytest.raises(Refused) as refused:
        accept(value, RUNTIME)
    assert refused.value.refusal.message.startswith(
        "spec.pools[1].resources.gpu: 2 cards per worker: a worker computes on one card"
    )
    with pytest.raises(SpecInvalid, match=r"spec\.pools\[1\]\.resources\.gpu: 2 cards per worker"):
        serving_of([LLMDeployment.model_validate(value)], "a.yaml")


def test_validate_names_the_field_and_ends_with_1(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "apiVersion: serving.antiphon.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {name: demo}\n"
        "spec:\n  model: {uri: /m}\n  pools: [{name: all, role: monolith, resources: {gpu: 2}}]\n"
    )
    result = CliRunner().invoke(app, ["-f", str(path)])
    assert result.exit_code == 1
    assert f"{path}:6: LLMDeployment/demo: spec.pools[0].resources.gpu: 2 cards per worker" in result.output


def test_the_example_for_cards_asks_for_nothing_impossible() -> None:
    example = Path(__file__).parents[3] / "deploy/examples/qwen3-30b-a3b-gpu.yaml"
    (found,) = parse_documents(example.read_bytes(), str(example))
    assert isinstance(found, LLMDeployment)
    assert not list(device_problems(found.spec))
