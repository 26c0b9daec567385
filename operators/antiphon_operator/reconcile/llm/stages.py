"""When the start of a revision passed each stage (control speed, pure). Must not know: Kubernetes calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from antiphon_operator.api.conditions import seconds, timestamp
from antiphon_operator.api.status import RolloutStatus, StageTimes
from antiphon_operator.reconcile.observe import Observed


def stages(
    previous: Mapping[str, Any],
    observed: Observed,
    rollout: RolloutStatus | None,
    cluster: str,
    *,
    is_complete: bool,
    now_s: float,
) -> StageTimes:
    """The first time each stage was seen for the revision being brought in; a new rollout starts over."""
    started = None if rollout is None else rollout.started_at
    before = previous.get("stages", {})
    if before.get("started") != started:
        before = {}
    service = observed.service
    newest = cluster if service is None or not service.pending else service.pending
    # While KubeRay has not begun, what is seen is of the revision before.
    begun = runs = False
    if service is not None and rollout is not None and service.current and service.revision == rollout.revision:
        begun = any(c.name == newest and c.cluster_revision in ("", service.cluster_revision) for c in observed.clusters)
        runs = begun and service.running and service.active == newest
    pods = [pod for pod in observed.pods if pod.cluster == newest] if begun else []
    seen = {
        "scheduled": bool(pods) and all(pod.scheduled for pod in pods),
        "imagePulled": bool(pods) and all(pod.started for pod in pods),
        "weightsReady": runs and not observed.unproven,
        "engineReady": begun and is_complete,
    }
    times = {stage: before.get(stage) or (timestamp(now_s) if now else None) for stage, now in seen.items()}
    return StageTimes(
        started=started,
        scheduled=times["scheduled"],
        image_pulled=times["imagePulled"],
        weights_ready=times["weightsReady"],
        engine_ready=times["engineReady"],
    )


def passed_stages(before: Mapping[str, Any], now: StageTimes | None) -> Iterator[tuple[str, float]]:
    """Stages that ``now`` has and ``before`` had not, each with its seconds since the revision was applied."""
    started = None if now is None else seconds(now.started)
    if now is None or started is None:
        return
    known = before if before.get("started") == now.started else {}
    for stage, value in now.model_dump(mode="json", by_alias=True, exclude_none=True).items():
        if stage != "started" and stage not in known:
            at = seconds(value)
            if at is not None:
                yield stage, max(0.0, at - started)
