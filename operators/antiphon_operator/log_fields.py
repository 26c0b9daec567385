"""What every log line of a pass carries: the object, its generation, its revision (control speed).

A pass is one task; what it notes is seen by whatever it logs afterwards, its own failure included. Must not know: how logs are
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_FIELDS: ContextVar[Mapping[str, str]] = ContextVar("antiphon_log_fields", default={})  # noqa: B039 - never changed in place


def note(**fields: object) -> None:
    """Add ``fields`` to every later log line of this task."""
    _FIELDS.set({**_FIELDS.get(), **{name: str(value) for name, value in fields.items()}})


def note_object(live: Mapping[str, Any]) -> None:
    """Note which object is reconciled, at which generation, and the revision that its status names."""
    metadata = live["metadata"]
    note(object=f"{live['kind']}/{metadata.get('namespace', '')}/{metadata['name']}", generation=metadata.get("generation", 0))
    revision = live.get("status", {}).get("revision", "")
    if revision:
        note(revision=revision)


def noted() -> Mapping[str, str]:
    """What this task has noted."""
    return _FIELDS.get()
