"""The ServingPool children of one LLMDeployment: made, handed over to whoever scales them, told their state (control speed).

Must not know: how sizes are decided.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.core.document.policies import ScalingMode
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.kube.base import Kube, Object, controller_of, name_of
from antiphon_operator.kube.resources import SERVING_POOL
from antiphon_operator.reconcile.llm.pools import PoolsPlan, serving_pool_status
from antiphon_operator.reconcile.observe import Observed
from antiphon_operator.reconcile.writer import Writer
from antiphon_operator.render import children as render
from antiphon_operator.render.names import MANAGER, SEED_MANAGER


async def apply_children(
    kube: Kube, writer: Writer, document: LLMDeployment, owner: Object, children: Mapping[str, Object]
) -> None:
    """Make and mend the child of every pool, and delete those of pools that are gone; ``children``: live ones by pool."""
    wanted = {pool.name: pool for pool in document.spec.pools}
    for name, pool in wanted.items():
        child, live = render.serving_pool(document, owner, pool), children.get(name)
        static = pool.scaling.mode is ScalingMode.STATIC
        if live is not None and not static:
            await _hand_over(writer, child, live, pool.replicas)
        if live is not None and static and _manages_replicas(live, SEED_MANAGER):
            await writer.apply(_seed(child, None), manager=SEED_MANAGER)  # ours alone again
        done = await writer.ensure(child, live)
        if done is not None and not static and "replicas" not in done["spec"]:
            await writer.apply(_seed(child, pool.replicas), manager=SEED_MANAGER)
    for name, live in children.items():
        if name not in wanted and controller_of(live) == writer.owner_uid:
            await kube.delete(SERVING_POOL, live["metadata"]["namespace"], name_of(live), uid=live["metadata"]["uid"])


async def tell_children(
    writer: Writer, document: LLMDeployment, children: Mapping[str, Object], plan: PoolsPlan, observed: Observed, home: str
) -> None:
    """Write every child's status; ``home``: the RayCluster whose pods count."""
    for pool in document.spec.pools:
        child = children.get(pool.name)
        if child is None:
            continue  # made in this very pass
        status = serving_pool_status(document, pool, child, plan, observed, home, writer.now_s)
        await writer.status(child, status.model_dump(mode="json", by_alias=True, exclude_none=True))


def _manages_replicas(live: Object, manager: str) -> bool:
    return any(
        entry["manager"] == manager and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in live["metadata"].get("managedFields", ())
    )


def _seed(child: Object, replicas: int | None) -> Object:
    metadata = {key: child["metadata"][key] for key in ("name", "namespace")}
    spec = {} if replicas is None else {"spec": {"replicas": replicas}}
    return {"apiVersion": child["apiVersion"], "kind": child["kind"], "metadata": metadata, **spec}


async def _hand_over(writer: Writer, child: Object, live: Object, replicas: int) -> None:
    """Before we stop writing replicas, a second manager of ours holds them, or leaving them out would delete them."""
    if _manages_replicas(live, MANAGER):
        await writer.apply(_seed(child, live["spec"].get("replicas", replicas)), manager=SEED_MANAGER)
