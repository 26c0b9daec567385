"""The door's interface: what the operator may ask of an API server, and how it fails (control speed).

KubeError                     an AntiphonError; ``status`` is the HTTP code
├── NotFound        404       the object, or the kind, does not exist
├── Conflict        409       another manager owns the field, the object changed meanwhile, or it exists already
├── Gone            410       the watch's resourceVersion is too old: list again
├── Refused         403, 422  not allowed, or not valid; trying again changes nothing
│   └── UnknownField          the kind's schema lacks a field of what was applied: its controller is of another version
├── Throttled       429       try again after ``retry_after_s``
└── ServerFault     5xx       or no answer at all; try again

Objects are JSON as the API server speaks it. Must not know: any client library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from antiphon.core.errors import AntiphonError
from antiphon_operator.kube.resources import Resource

Object = dict[str, Any]
_UNKNOWN_FIELD = "field not declared in schema"  # of server-side apply
Labels = Mapping[str, str | frozenset[str]]  # each label's value, or the values it may have


class KubeError(AntiphonError):
    """The API server did not do what was asked."""

    code = "kubernetes_error"
    status: ClassVar[int] = 500


class NotFound(KubeError):
    """The object or its kind does not exist."""

    status = 404


class Conflict(KubeError):
    """Another manager owns a field, the object changed meanwhile, or it exists already."""

    status = 409


class Gone(KubeError):
    """The resourceVersion to watch from is too old."""

    status = 410


class Refused(KubeError):
    """Not allowed, or not valid."""

    status = 422


class UnknownField(Refused):
    """The kind's schema lacks a field of what was applied."""


class Throttled(KubeError):
    """Too many requests."""

    status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerFault(KubeError):
    """The server failed or did not answer."""

    status = 500
    retryable = True


def error_of(status: int, message: str, retry_after_s: float | None = None) -> KubeError:
    """The error for an HTTP status."""
    if status == 429:
        return Throttled(message, retry_after_s if retry_after_s is not None else 1.0)
    if _UNKNOWN_FIELD in message:
        return UnknownField(message)  # with status 500, though trying again changes nothing
    if status >= 500:
        return ServerFault(message)
    kinds: dict[int, type[KubeError]] = {404: NotFound, 409: Conflict, 410: Gone}
    return kinds.get(status, Refused)(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Objects and the resourceVersion from which to watch on."""

    items: tuple[Object, ...]
    resource_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """One change."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object


class Kube(Protocol):
    """What the operator may ask of an API server. Every call ends within a deadline of the implementation's.

    All raise KubeError; ``get`` and ``delete`` take a missing object for an answer.
    """

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """The object, or None where there is none."""
        ...

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Listing:
        """Objects of ``namespace`` (None = all) that carry ``labels``."""
        ...

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        labels: Labels | None = None,
        timeout_s: float = 300.0,
    ) -> AsyncIterator[WatchEvent]:
        """Changes after ``resource_version``; ends when the server cuts it or after ``timeout_s``. Raises Gone."""
        ...

    async def apply(self, value: Object, *, manager: str, force: bool = False) -> Object:
        """Server-side apply as ``manager``; creates what is missing. Raises Conflict naming other managers."""
        ...

    async def apply_status(self, value: Object, *, manager: str) -> Object:
        """Server-side apply of ``status`` only."""
        ...

    async def json_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Sequence[Object], *, manager: str
    ) -> Object:
        """An RFC 6902 patch. Raises Refused when a test in it fails and Conflict when a resourceVersion in it is old."""
        ...

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """Delete, in the background, only the object of ``uid`` where that is given."""
        ...


def name_of(value: Mapping[str, Any]) -> str:
    """The object's name."""
    return str(value["metadata"]["name"])


def namespace_of(value: Mapping[str, Any]) -> str | None:
    """The object's namespace, or None for a cluster-wide one."""
    namespace = value["metadata"].get("namespace")
    return None if namespace is None else str(namespace)


def controller_of(value: Mapping[str, Any]) -> str | None:
    """The uid of the object's controlling owner."""
    for owner in value["metadata"].get("ownerReferences", ()):
        if owner.get("controller"):
            return str(owner["uid"])
    return None


def owner_reference(value: Mapping[str, Any]) -> Object:
    """A controlling owner reference to ``value``."""
    return {
        "apiVersion": value["apiVersion"],
        "kind": value["kind"],
        "name": value["metadata"]["name"],
        "uid": value["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
