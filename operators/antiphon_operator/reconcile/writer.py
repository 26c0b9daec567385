"""Writes what is wanted and only when it differs from what is there (control speed).

Every object carries a fingerprint of what was last wanted of it, so that a field that is no longer wanted is noticed too. Must not
know: what is wanted.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.errors import AntiphonError
from antiphon_operator.api.conditions import Reason, Type, timestamp
from antiphon_operator.api.status import Condition
from antiphon_operator.kube.base import Conflict, Kube, Object, Refused, UnknownField, controller_of, name_of, namespace_of
from antiphon_operator.kube.resources import resource_of
from antiphon_operator.render.canonical import fingerprint
from antiphon_operator.render.names import ANNOTATION_INTENT, MANAGER

_UNREAD: Any = object()
_BAD_WHEN_TRUE = (Type.DEGRADED, Type.STALLED, Type.ROLLBACK_IN_PROGRESS, Type.SCALING_LIMITED)
_NEITHER = (Type.IN_USE, Type.RECONCILING, Type.PROGRESSING)  # neither state of these is bad news
# A start, or what somebody asked for: False, and no cause for concern.
_EXPECTED = (
    Reason.INITIALIZING, Reason.DOWNLOADING, Reason.PODS_PENDING, Reason.SUSPENDED, Reason.SCALED_TO_ZERO, Reason.NEW_REVISION,
    Reason.SCALE_DOWN_WINDOW,
)  # fmt: skip
_LOG = logging.getLogger(__name__)


class NotOurs(AntiphonError):
    """An object of the name we need belongs to somebody else; it is not adopted."""

    code = "name_conflict"


def contains(live: Any, wanted: Any) -> bool:
    """True when every field of ``wanted`` has its value in ``live``; lists must have equal lengths."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(key in live and contains(live[key], inner) for key, inner in wanted.items())
    if isinstance(wanted, list):
        same = isinstance(live, list) and len(live) == len(wanted)
        return same and all(contains(a, b) for a, b in zip(live, wanted, strict=True))
    return bool(live == wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unapplied:
    """An object that the API server did not take, and why; trying again changes nothing."""

    reason: Reason
    message: str


@dataclass(slots=True)
class Writer:
    """Writes for one reconcile of one object, whose uid is ``owner_uid``."""

    kube: Kube
    owner_uid: str
    now_s: float
    unapplied: list[Unapplied] = field(default_factory=list)

    async def ensure(
        self, wanted: Object, live: Object | None = _UNREAD, *, manager: str = MANAGER, force: bool = False
    ) -> Object | None:
        """Make the API server's object contain ``wanted``; ``live`` is what is there, read now when not given.

        None says that a list by our labels had none. An object of the name may be there all the same, without our labels, so it is
        read before anything is created.

        Returns:
            The object, or None when the API server did not take it (see ``unapplied``).

        Raises:
            NotOurs: the object exists and another object controls it, or nobody does.
        """
        resource = resource_of(wanted["apiVersion"], wanted["kind"])
        if live is _UNREAD or live is None:
            live = await self.kube.get(resource, namespace_of(wanted), name_of(wanted))
        if live is not None and controller_of(live) != self.owner_uid:
            raise NotOurs(f"{wanted['kind']} {name_of(wanted)} exists and is not ours")
        mark = fingerprint(wanted, 16)
        metadata = wanted["metadata"]
        annotations = {**metadata.get("annotations", {}), ANNOTATION_INTENT: mark}
        marked = {**wanted, "metadata": {**metadata, "annotations": annotations}}
        if live is not None and contains(live, marked):
            return live
        return await self.apply(marked, manager=manager, force=force)

    async def apply(self, wanted: Object, *, manager: str = MANAGER, force: bool = False) -> Object | None:
        """Apply; a field that another manager holds is noted and left alone unless ``force``, and so is what is not allowed.

        Raises:
            UnknownField: the kind is of another version.
            KubeError: the API server failed; try again.
        """
        try:
            return await self.kube.apply(wanted, manager=manager, force=force)
        except UnknownField:
            raise
        except (Conflict, Refused) as error:
            reason = Reason.FIELD_CONFLICT if isinstance(error, Conflict) else Reason.APPLY_REFUSED
            self.unapplied.append(Unapplied(reason=reason, message=f"{wanted['kind']} {name_of(wanted)}: {error}"))
            return None

    async def status(self, live: Object, status: Mapping[str, Any]) -> bool:
        """Write ``status`` when it differs; True when it was written."""
        if live.get("status") == status:
            return False
        metadata = {"name": name_of(live), "namespace": namespace_of(live)}
        value = {"apiVersion": live["apiVersion"], "kind": live["kind"], "metadata": metadata, "status": dict(status)}
        await self.kube.apply_status(value, manager=MANAGER)
        return True

    async def event(self, about: Object, condition: Condition, *, first: bool = False) -> None:
        """Tell of a changed condition; not of a ``first`` one that is as it should be.

        The name is made from the change, so that a repeated write is the same event.
        """
        warning = is_warning(condition)
        if first and not warning and condition.status == "False":
            return
        parts = [about["metadata"]["uid"], condition.type, condition.status, condition.reason, condition.last_transition_time]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        fields = {"condition": condition.type, "status": condition.status, "reason": condition.reason}
        _LOG.log(logging.WARNING if warning else logging.INFO, "condition changed", extra=fields)
        now = timestamp(self.now_s)
        why = condition.message or f"reason {condition.reason}"
        await self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{name_of(about)}.{digest}", "namespace": namespace_of(about)},
                "involvedObject": {
                    "apiVersion": about["apiVersion"],
                    "kind": about["kind"],
                    "name": name_of(about),
                    "namespace": namespace_of(about),
                    "uid": about["metadata"]["uid"],
                },
                "reason": condition.reason,
                "message": f"{condition.type} is {condition.status}: {why}"[:1000],
                "type": "Warning" if warning else "Normal",
                "source": {"component": MANAGER},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            },
            manager=MANAGER,
            force=True,
        )


def is_warning(condition: Condition) -> bool:
    """True for news that somebody should look at."""
    if condition.type in _NEITHER:
        return condition.type == Type.PROGRESSING and condition.reason == Reason.PROGRESS_DEADLINE_EXCEEDED
    if condition.type in _BAD_WHEN_TRUE:
        return condition.status == "True" and condition.reason not in _EXPECTED
    return condition.status == "False" and condition.reason not in _EXPECTED
