"""The error tree as grpc statuses, and back (request speed).

A status carries the error's code, field and retry-after in its trailing metadata, so that nothing is lost on the way:

    antiphon-code, antiphon-field (percent-encoded), antiphon-retry-after-s

Must not know: which service failed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import grpc

from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    PeerLost,
    PermissionDenied,
    SpecInvalid,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

CODE_KEY = "antiphon-code"
FIELD_KEY = "antiphon-field"
RETRY_AFTER_KEY = "antiphon-retry-after-s"

# Errors whose constructors take more than a message come back as the nearest ancestor that does not.
_BY_STATUS: dict[str, type[AntiphonError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": UnknownModel,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "CANCELLED": Cancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
}

# What stands in grpc's own words about a connection, and what people say.
_REASONS = (
    ("Connection refused", "connection refused"),
    ("DNS resolution failed", "there is no host of that name"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is signed by nobody who is trusted here"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("andshake failed", "the TLS handshake failed"),
    ("SETTINGS frame", "it does not speak gRPC, or wants TLS"),
    ("http2 header", "it does not speak gRPC, or wants TLS"),
    ("unreachable", "the network is unreachable"),
    ("No route to host", "no route to that host"),
    ("imed out", "no answer in time"),
    ("imeout", "no answer in time"),
    ("GOAWAY", "the server ended it"),
    ("Socket closed", "the connection was lost"),
    ("Connection reset", "the connection was lost"),
    ("Broken pipe", "the connection was lost"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a failed call ends with."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str], ...]


def status_of(error: AntiphonError) -> Status:
    """The status that carries ``error``. An InternalError's message stays with us."""
    metadata = [(CODE_KEY, error.code)]
    if isinstance(error, InvalidInput) and error.field is not None:
        metadata.append((FIELD_KEY, quote(error.field[:512], safe="[]._- ")))
    if isinstance(error, Overloaded | Unavailable):
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    message = "internal error" if isinstance(error, InternalError) else str(error)
    return Status(code=grpc.StatusCode[error.grpc_status], message=message, trailing_metadata=tuple(metadata))


def error_of(code: str, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> AntiphonError:
    """The error with that stable ``code``; an unknown code gives InternalError."""
    kind = _by_code().get(code, InternalError)
    return _make(kind, message, field, retry_after_s)


def error_from_call(error: grpc.RpcError) -> AntiphonError:
    """The error that a failed call carries, whoever the server is."""
    call: Any = error  # RpcError is an empty base; what grpc raises is also a Call
    status: str = call.code().name if hasattr(call, "code") else "UNKNOWN"
    message = (call.details() or "") if hasattr(call, "details") else str(error)
    found: dict[str, str] = {}
    metadata: Iterable[tuple[str, str | bytes]] = (call.trailing_metadata() or ()) if hasattr(call, "trailing_metadata") else ()
    for key, value in metadata:
        if isinstance(value, str):
            found[key] = value
    kind = _by_code().get(found.get(CODE_KEY, "")) or _BY_STATUS.get(status, InternalError)
    field = unquote(found[FIELD_KEY]) if FIELD_KEY in found else None
    return _make(kind, message or status, field, _seconds(found.get(RETRY_AFTER_KEY)))


def unreachable(address: str, details: str) -> str | None:
    """Why there is no connection to ``address``, in a person's words; None where grpc's ``details`` are about something else."""
    found = next((words for sign, words in _REASONS if sign in details), None)
    return None if found is None else f"no connection to {address}: {found}"


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _make(kind: type[AntiphonError], message: str, field: str | None, retry_after_s: float | None) -> AntiphonError:
    if issubclass(kind, InvalidInput):
        return kind(message, field)
    if issubclass(kind, Overloaded | Unavailable) and retry_after_s is not None:
        return kind(message, retry_after_s)
    return kind(message)


def _by_code() -> dict[str, type[AntiphonError]]:
    """Every class of the tree by its code, also those that other packages derived; the nearest usable ancestor's where
    the constructor takes more than a message.
    """
    found: dict[str, type[AntiphonError]] = {InternalError.code: InternalError}
    waiting: list[type[AntiphonError]] = [AntiphonError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        found.setdefault(kind.code, _constructible(kind))
    return found


def _constructible(kind: type[AntiphonError]) -> type[AntiphonError]:
    if issubclass(kind, SpecInvalid):
        return InvalidInput
    if issubclass(kind, PeerLost):
        return Unavailable
    return kind if kind.__init__ in _PLAIN else InternalError


_PLAIN = (AntiphonError.__init__, InvalidInput.__init__, Overloaded.__init__, Unavailable.__init__)


def closed_meanwhile() -> bool:
    """Whether the CancelledError being handled is grpc's word for a connection that was closed under a running call, rather than
    the cancelling of the task that made it, which must go on.
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling()
