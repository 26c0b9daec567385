"""Conditions after the Kubernetes conventions: their types and reasons, and when their times move (control speed, pure).

The troubleshooting page has a heading for every reason. Must not know: how anything is observed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from antiphon_operator.api.status import Condition

MAX_MESSAGE = 1000


class Type(StrEnum):
    """What is observed. The last group is true when something is wrong or under way."""

    ACCEPTED = "Accepted"
    MODEL_READY = "ModelReady"
    POOLS_READY = "PoolsReady"
    ROUTER_READY = "RouterReady"
    SCALING_READY = "ScalingReady"
    AVAILABLE = "Available"
    READY = "Ready"
    PROGRESSING = "Progressing"
    EXPERTS_READY = "ExpertsReady"
    IN_USE = "InUse"

    DEGRADED = "Degraded"
    ROLLBACK_IN_PROGRESS = "RollbackInProgress"
    SCALING_LIMITED = "ScalingLimited"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Reason(StrEnum):
    """Why, in one word."""

    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    REFERENCE_NOT_FOUND = "ReferenceNotFound"
    KUBERAY_MISSING = "KubeRayMissing"
    UNSUPPORTED_KUBERAY = "UnsupportedKubeRay"
    UNSUPPORTED_RAY_VERSION = "UnsupportedRayVersion"
    NAME_CONFLICT = "NameConflict"
    FIELD_CONFLICT = "FieldConflict"
    APPLY_REFUSED = "ApplyRefused"
    GATEWAY_API_MISSING = "GatewayApiMissing"
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    CACHED = "Cached"
    DIRECT = "Direct"
    DOWNLOADING = "Downloading"
    DOWNLOAD_FAILED = "DownloadFailed"
    DIGEST_MISMATCH = "DigestMismatch"
    ALL_READY = "AllReady"
    PODS_PENDING = "PodsPending"
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"
    CRASH_LOOP = "CrashLoop"
    DEPLOYMENT_UNHEALTHY = "DeploymentUnhealthy"
    METRICS_FRESH = "MetricsFresh"
    METRICS_STALE = "MetricsStale"
    READY = "Ready"
    SCALED_TO_ZERO = "ScaledToZero"
    SUSPENDED = "Suspended"
    INITIALIZING = "Initializing"
    NEW_REVISION = "NewRevision"
    COMPLETE = "Complete"
    PAUSED = "Paused"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    ROLLED_BACK = "RolledBack"
    GPU_BUDGET = "GpuBudget"
    RATIO = "Ratio"
    MIN_MAX = "MinMax"
    SCALE_DOWN_WINDOW = "ScaleDownWindow"
    NOT_LIMITED = "NotLimited"
    ALL_EXPERTS_READY = "AllExpertsReady"
    EXPERT_UNAVAILABLE = "ExpertUnavailable"
    NO_EXPERT_READY = "NoExpertReady"
    IN_USE = "InUse"
    NOT_IN_USE = "NotInUse"
    HEALTHY = "Healthy"


def timestamp(now_s: float) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return datetime.datetime.fromtimestamp(int(now_s), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str | None) -> float | None:
    """Seconds since the epoch of an RFC 3339 time, or None."""
    if text is None:
        return None
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


class ConditionSet:
    """The conditions of one object being written; times of those whose status stays are kept."""

    def __init__(self, previous: Sequence[Mapping[str, Any]], *, generation: int, now_s: float) -> None:
        self._previous = {condition["type"]: condition for condition in previous}
        self._generation = generation
        self._now = timestamp(now_s)
        self._conditions: dict[str, Condition] = {}

    def set(self, type_: Type, holds: bool | None, reason: Reason, message: str = "") -> None:
        """Record one observation; None = unknown."""
        status = "Unknown" if holds is None else "True" if holds else "False"
        before = self._previous.get(type_)
        same = before is not None and before["status"] == status
        self._conditions[type_] = Condition(
            type=type_,
            status="Unknown" if holds is None else "True" if holds else "False",
            reason=reason,
            message=message[:MAX_MESSAGE],
            last_transition_time=before["lastTransitionTime"] if same and before is not None else self._now,
            observed_generation=self._generation,
        )

    def holds(self, type_: Type) -> bool:
        """True when that was recorded as true."""
        return type_ in self._conditions and self._conditions[type_].status == "True"

    def reason(self, type_: Type) -> str:
        """Why, of what was recorded; empty when nothing was."""
        return self._conditions[type_].reason if type_ in self._conditions else ""

    def message(self, type_: Type) -> str:
        """What was said with it; empty when nothing was recorded."""
        return self._conditions[type_].message if type_ in self._conditions else ""

    @property
    def values(self) -> tuple[Condition, ...]:
        """All of them, in a fixed order."""
        return tuple(self._conditions[type_] for type_ in sorted(self._conditions))

    def is_new(self, condition: Condition) -> bool:
        """True when nothing of its type was recorded before."""
        return condition.type not in self._previous

    def changes(self) -> list[Condition]:
        """Those whose status or reason differs from before."""
        return [
            condition
            for condition in self.values
            if (before := self._previous.get(condition.type)) is None
            or (before["status"], before["reason"]) != (condition.status, condition.reason)
        ]
