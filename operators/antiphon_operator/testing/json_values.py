"""JSON values as an API server handles them: copied, compared, merged (control speed, pure).

Must not know: which objects there are.
"""

from __future__ import annotations

import marshal
from typing import Any, TypeVar, cast

from antiphon_operator.kube.base import Object

_T = TypeVar("_T")
_SCALARS = frozenset((str, int, float, bool, type(None)))
_WITHOUT_REFERENCES = 2  # the last version of marshal in which equal parts stay apart
SERVER_METADATA = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "deletionTimestamp")


def received(value: _T) -> _T:
    """A deep copy of what a client gave, as JSON: tuples are lists."""
    if isinstance(value, dict):
        return cast("_T", {key: inner if type(inner) in _SCALARS else received(inner) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return cast("_T", [inner if type(inner) in _SCALARS else received(inner) for inner in value])
    return value


def copied(value: _T) -> _T:
    """A deep copy of what was received before; most of a scenario's time would go to copy.deepcopy."""
    try:
        return cast("_T", marshal.loads(marshal.dumps(cast("Any", value), _WITHOUT_REFERENCES)))  # noqa: S302 - our own bytes
    except ValueError:  # a string of a class of its own, say
        return received(value)


def appliable(value: Object, subresource: str | None) -> Object:
    """The part a writer may own: status only, all but status, or (None) both; never what the server fills in."""
    if subresource == "status":
        return {"status": value.get("status", {})}
    out = {key: inner for key, inner in value.items() if key != "status" or subresource is None}
    if "metadata" in out:
        metadata = {k: v for k, v in out["metadata"].items() if k not in SERVER_METADATA and k not in ("name", "namespace")}
        out["metadata"] = metadata
        if not metadata:
            del out["metadata"]
    out.pop("apiVersion", None)
    out.pop("kind", None)
    return received(out)


def comparable(value: Object) -> Object:
    """What makes two states of an object differ: all but what every write changes."""
    metadata = {k: v for k, v in value["metadata"].items() if k not in ("resourceVersion", "managedFields")}
    return {**value, "metadata": metadata}


def spec_part(value: Object) -> Object:
    """What a change of makes a new generation."""
    return {key: inner for key, inner in value.items() if key not in ("metadata", "status", "apiVersion", "kind")}


def merge_patch(value: Any, patch: Any) -> Any:
    """``value`` after an RFC 7386 patch; neither is changed."""
    if not isinstance(patch, dict):
        return received(patch)
    out = dict(value) if isinstance(value, dict) else {}
    for key, inner in patch.items():
        if inner is None:
            out.pop(key, None)
        else:
            out[key] = merge_patch(out.get(key), inner)
    return out
