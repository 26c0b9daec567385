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
from antiphon_operator.api.conditions import timestamp
from antiphon_operator.api.status import Condition
from antiphon_operator.kube.base import Conflict, Kube, Object, controller_of, name_of, namespace_of
from antiphon_operator.kube.resources import resource_of
from antiphon_operator.render.canonical import fingerprint
from antiphon_operator.render.names import ANNOTATION_INTENT, MANAGER

_UNREAD: Any = object()
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


@dataclass(slots=True)
class Writer:
    """Writes for one reconcile of one object, whose uid is ``owner_uid``."""

    kube: Kube
    owner_uid: str
    now_s: float
    conflicts: list[str] = field(default_factory=list)  # fields that another manager holds

    async def ensure(self, wanted: Object, live: Object | None = _UNREAD, *, manager: str = MANAGER) -> Object | None:
        """Make the API server's object contain ``wanted``; ``live`` is what is there, read now when not given.

        None says that a list by our labels had none. An object of the name may be there all the same, without our labels, so it is
        read before anything is created.

        Returns:
            The object, or None when another manager holds a field of it (see ``conflicts``).

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
        return await self.apply(marked, manager=manager)

    async def apply(self, wanted: Object, *, manager: str = MANAGER) -> Object | None:
        """Apply without forcing; a field that another manager holds is noted and left alone."""
        try:
            return await self.kube.apply(wanted, manager=manager)
        except Conflict as error:
            self.conflicts.append(f"{wanted['kind']} {name_of(wanted)}: {error}")
            return None

    async def status(self, live: Object, status: Mapping[str, Any]) -> bool:
        """Write ``status`` when it differs; True when it was written."""
        if live.get("status") == status:
            return False
        metadata = {"name": name_of(live), "namespace": namespace_of(live)}
        value = {"apiVersion": live["apiVersion"], "kind": live["kind"], "metadata": metadata, "status": dict(status)}
        await self.kube.apply_status(value, manager=MANAGER)
        return True

    async def event(self, about: Object, condition: Condition) -> None:
        """Tell of a changed condition. The name is made from the change, so that a repeated write is the same event."""
        parts = [about["metadata"]["uid"], condition.type, condition.status, condition.reason, condition.last_transition_time]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        bad = condition.status == "False" or condition.type in ("Degraded", "Stalled", "RollbackInProgress")
        good_when_false = condition.type in ("Degraded", "Stalled", "RollbackInProgress", "Reconciling", "Progressing")
        warning = bad and not (condition.status == "False" and good_when_false)
        fields = {"condition": condition.type, "status": condition.status, "reason": condition.reason}
        _LOG.log(logging.WARNING if warning else logging.INFO, "condition changed", extra=fields)
        now = timestamp(self.now_s)
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
                "message": f"{condition.type} is {condition.status}: {condition.message}"[:1000],
                "type": "Warning" if warning else "Normal",
                "source": {"component": MANAGER},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            },
            manager=MANAGER,
            force=True,
        )
