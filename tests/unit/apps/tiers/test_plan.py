"""Which deployments share a process because a composition's tiers say so."""

from typing import Any

from antiphon.apps.process.config import LogSettings, WorkerConfig
from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.apps.serve.plan import PoolTemplate
from antiphon.core.document.loading import parse_object
from antiphon.core.ids import Epoch


def _serving() -> Serving:
    def document(kind: str, name: str, spec: dict[str, Any]) -> Any:
        value = {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        return parse_object(value, "test")

    pools = [{"name": "monolith", "role": "monolith"}]
    deployments = [document("LLMDeployment", name, {"model": {"uri": f"/models/{name}"}, "pools": pools}) for name in "abc"]
    experts = [{"name": f"expert-{name}", "deploymentRef": name, "memory": "1Gi"} for name in "bc"]
    tiers = {"residentMemory": "1Gi", "hostMemory": "2Gi"}
    team = document("CompositionOfExperts", "team", {"experts": experts, "general": "expert-b", "tiers": tiers})
    return serving_of([*deployments, team], "test")


def test_experts_of_a_composition_with_tiers_share_a_process_and_others_have_their_own() -> None:
    serving = _serving()
    (tier_pool,) = serving.tier_pools
    assert [(member.expert, member.deployment) for member in tier_pool.members] == [("expert-b", "b"), ("expert-c", "c")]
    assert (serving.num_workers, serving.num_processes) == (3, 2)
    assert serving.tier_pool_of("a") is None
    assert serving.tier_pool_of("c") == tier_pool


def test_a_pool_reaches_its_process_whole() -> None:
    serving = _serving()
    document, tier_pool = serving.deployments[1], serving.tier_pool_of("b")
    template = PoolTemplate(
        document=document,
        pool="monolith",
        checkpoint="/models/b",
        directory="grpc://127.0.0.1:1",
        host="127.0.0.1",
        drain_s=1.0,
        log=LogSettings(),
        tier_pool=tier_pool,
    )
    config = template.worker(0, Epoch(3))
    assert WorkerConfig.from_json(config.to_json()) == config
    assert config.tier_pool is not None
    assert config.tier_pool.tiers.resident_memory_bytes == 1 << 30
