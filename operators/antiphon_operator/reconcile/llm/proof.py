"""Whether all parts of a deployment run the revision that is applied (control speed, pure).

KubeRay's status is no proof after a change in place: it reads Serve's status, then gives Serve the new configuration, then writes
what it read as the status of the new generation. So the parts are asked. Where none can be, KubeRay's word counts once it has stood
for several of its rounds. What was proven once holds until another revision is applied. Must not know: how gateways are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.planning.rollout import Action, Step
from antiphon_operator.reconcile.gateways import GatewaySource, GatewayWord
from antiphon_operator.reconcile.llm.pools import PoolsPlan
from antiphon_operator.reconcile.llm.status import has_stood
from antiphon_operator.reconcile.observe import Observed
from antiphon_operator.render.names import GATEWAY, http_port, http_scheme

SETTLED_S = 15.0  # KubeRay looks at Serve every 2 s
_APPLIES = (Action.CREATE, Action.APPLY_SERVE, Action.APPLY_CLUSTER, Action.REPLACE_PENDING, Action.RESUME)


async def with_proof(
    source: GatewaySource, document: LLMDeployment, plan: PoolsPlan, observed: Observed, previous: Mapping[str, Any], now_s: float
) -> Observed:
    """``observed`` with what of the applied revision is not proven; ``previous``: the last status."""
    service = observed.service
    if service is None or not service.active or _was_proven(previous, service.revision):
        return observed
    if not service.current:
        return replace(observed, unproven="KubeRay has not read it yet")
    if not (service.running or service.resizing):
        return replace(observed, unproven="Serve is at work on it")
    gateways = {
        p.name: p.address for p in observed.pods if p.pool == GATEWAY and p.cluster == service.active and p.ready and p.address
    }
    scheme, port = http_scheme(document), http_port(document)
    urls = {name: f"{scheme}://{_in_url(address)}:{port}" for name, address in gateways.items()}
    words = await source.ask(urls) if service.told_revision else {}
    settled = has_stood(previous.get("rollout") or {}, observed, SETTLED_S, now_s)
    return replace(observed, unproven=why_unproven(document, plan, service.told_revision, gateways, words, settled=settled))


def why_unproven(
    document: LLMDeployment,
    plan: PoolsPlan,
    revision: str,
    gateways: Mapping[str, str],
    words: Mapping[str, GatewayWord],
    *,
    settled: bool,
) -> str:
    """What keeps ``revision`` from being proven, for people; "" = nothing does.

    Args:
        document: what is asked for.
        plan: the pools' sizes.
        revision: what parts that run what is applied say.
        gateways: addresses of those that are ready, by pod.
        words: what those say that named a revision.
        settled: KubeRay's word has stood long enough to be taken where there is no other.
    """
    if not words:
        return "" if settled else "no gateway has said yet which revision it runs"
    for name in sorted(gateways):
        word = words.get(name)
        if word is None:
            return f"gateway {name} has not said yet which revision it runs"
        if word.revision != revision:
            return f"gateway {name} still runs revision {word.revision}"
        for pool in document.spec.pools:
            counts = word.revisions.get(pool.name, {})
            old = sorted(other for other in counts if other != revision)
            if old:
                return f"{counts[old[0]]} workers of pool {pool.name} still run revision {old[0] or 'unknown'}"
            least = min(pool.parallelism.num_shards, plan.sizes.replicas[pool.name])
            if counts.get(revision, 0) < least:
                return f"gateway {name} knows {counts.get(revision, 0)} of {least} workers of pool {pool.name} that run it"
    return ""


def stays_proven(before: Mapping[str, Any], step: Step, applied: str, *, is_complete: bool) -> bool:
    """Whether the revision of ``step`` is proven after it.

    ``before`` is the last rollout, ``applied`` the revision that was applied before the step.
    """
    if step.action in _APPLIES or step.revision.name != applied:
        return False
    return is_complete or (before.get("revision") == applied and bool(before.get("proven")))


def _was_proven(previous: Mapping[str, Any], revision: str) -> bool:
    rollout = previous.get("rollout") or {}
    if rollout.get("revision") != revision:
        return False
    if "proven" not in rollout:  # written by an operator that knew no proof
        return bool(previous.get("lastGoodRevision") == revision)
    return bool(rollout["proven"])


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
