"""What the rollout planner is told about a deployment, and what is remembered of its progress (control speed, pure).

Must not know: Kubernetes calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import timestamp
from antiphon_operator.api.status import RolloutStatus
from antiphon_operator.kube.base import Object
from antiphon_operator.planning.rollout import Action, RevisionRef, Step, World, target_of
from antiphon_operator.reconcile.llm.pools import PoolsPlan
from antiphon_operator.reconcile.llm.proof import stays_proven
from antiphon_operator.reconcile.llm.status import complete, furthest, has_stood, progress_marker
from antiphon_operator.reconcile.observe import Observed
from antiphon_operator.render.revision import Revision, from_object


def plan_rollout(
    document: LLMDeployment,
    observed: Observed,
    revisions: Mapping[str, Object],
    plan: PoolsPlan,
    revision: Revision,
    previous: Mapping[str, Any],
    now_s: float,
    *,
    awaited: str = "",
) -> World:
    """What the rollout planner must know. ``revisions`` are the kept ControllerRevisions, ``previous`` the last status.

    ``awaited``: what the weights of ``revision`` still wait for.
    """
    spec = document.spec
    service = observed.service
    refs = {name: _ref(from_object(value), plan.sizes.replicas) for name, value in revisions.items()}
    wanted = _ref(revision, plan.sizes.replicas)
    applied = None
    if service is not None:
        fallback = RevisionRef(name=service.revision, cluster=service.cluster_revision)
        applied = refs.get(service.revision, fallback)
    planned = World(
        wanted=wanted,
        applied=applied,
        last_good=refs.get(previous.get("lastGoodRevision", "")),
        failed=previous.get("failedRevision", ""),
        strategy=spec.rollout.strategy,
        paused=spec.rollout.paused,
        auto_rollback=spec.rollout.auto_rollback,
        suspend=spec.suspend,
        gpu_budget=spec.gpu_budget,
        gpus_held=observed.gpus(),
        ready=complete(document, plan, observed),
        suspended_spec=service is not None and service.suspend,
        suspended=service is not None and service.suspended and not observed.clusters and all(pod.ended for pod in observed.pods),
        num_clusters=len(observed.clusters),
        deadline_passed=_deadline_passed(previous, observed, spec.rollout.progress_deadline_s, now_s),
        awaited=awaited,
    )
    if service is None or not service.pending:
        return planned
    pending = next((c for c in observed.clusters if c.name == service.pending), None)
    aim = target_of(planned)
    stale = pending is not None and pending.cluster_revision not in ("", aim.cluster) and len(observed.clusters) > 1
    return replace(planned, stale_pending=service.pending if stale else "")


def _ref(revision: Revision, sizes: Mapping[str, int]) -> RevisionRef:
    return RevisionRef(name=revision.name, cluster=revision.cluster_revision, num_gpus=revision.num_gpus(sizes))


def _deadline_passed(previous: Mapping[str, Any], observed: Observed, deadline_s: float, now_s: float) -> bool:
    rollout = previous.get("rollout")
    service = observed.service
    if not rollout or service is None or rollout["revision"] != service.revision:
        return False
    return has_stood(rollout, observed, deadline_s, now_s)


def rollout_status(
    previous: Mapping[str, Any], observed: Observed, step: Step, now_s: float, *, is_complete: bool
) -> RolloutStatus:
    """Where the rollout stands after ``step``; progress is any change of what is seen."""
    now = timestamp(now_s)
    before = previous.get("rollout") or {}
    same = before.get("revision") == step.revision.name
    marker = furthest(before.get("marker", ""), progress_marker(observed))
    moved = before.get("marker") != marker
    at_rest = step.action is Action.NOTHING
    strategy = step.strategy.value if step.strategy is not None else before.get("strategy", "") if same else ""
    return RolloutStatus(
        revision=step.revision.name,
        strategy=strategy,
        step=f"{step.action.value}: {step.why}",
        started_at=before["startedAt"] if same else now,
        last_progress_at=before["lastProgressAt"] if same and (at_rest or not moved) else now,
        marker=marker if not (same and at_rest) else before.get("marker", marker),
        proven=observed.service is not None and stays_proven(before, step, observed.service.revision, is_complete=is_complete),
    )
