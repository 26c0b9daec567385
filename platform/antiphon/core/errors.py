"""The one exception tree of the platform, and how each member looks at the doors (values).

AntiphonError                       http  grpc                 retryable
├── InvalidInput(field)             400   INVALID_ARGUMENT     no
│   ├── SpecInvalid(problems)       400   INVALID_ARGUMENT     no
│   ├── ContextLengthExceeded       400   INVALID_ARGUMENT     no
│   ├── UnknownModel                404   NOT_FOUND            no
│   ├── AlreadyRated                409   ALREADY_EXISTS       no
│   └── UnsupportedModel            400   INVALID_ARGUMENT     no
├── Unauthenticated                 401   UNAUTHENTICATED      no
├── PermissionDenied                403   PERMISSION_DENIED    no
├── Overloaded(retry_after_s)       429   RESOURCE_EXHAUSTED   yes
├── Cancelled                       499   CANCELLED            no
├── DeadlineExceeded                504   DEADLINE_EXCEEDED    no
├── Unavailable(retry_after_s)      503   UNAVAILABLE          yes
│   └── PeerLost(peer)              503   UNAVAILABLE          yes
├── LayoutMismatch(peer)            500   FAILED_PRECONDITION  no
├── CorruptMessage(peer)            500   DATA_LOSS            no
├── CheckpointInvalid               500   FAILED_PRECONDITION  no
└── InternalError                   500   INTERNAL             no

Third-party errors are translated into this tree at the door of their library. Must not know: any transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar


class AntiphonError(Exception):
    """Root of the tree; ``code`` is the stable machine-readable name of the error."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


_E = TypeVar("_E", bound=AntiphonError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An error as a value: how one crosses a seam that raises nothing (a step's output, an engine's update)."""

    code: str  # of the tree
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, error: AntiphonError) -> ErrorInfo:
        """What is to be told of ``error``."""
        return cls(code=error.code, message=str(error), retryable=error.retryable)

    @classmethod
    def internal(cls, message: str) -> ErrorInfo:
        """A fault of ours."""
        return cls(code=AntiphonError.code, message=message)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def kept(error: _E) -> _E:
    """``error`` as it may be kept: without the frames that it passed through, which hold links, memory and messages."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class InvalidInput(AntiphonError):
    """What the caller sent can't be taken; ``field`` is the path of the offending field, or None."""

    code = "invalid_value"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class StructureRefused(InvalidInput):
    """A worker can't hold an answer to its grammar; which of the request's fields asked for it, the gateway knows."""

    code = "structure_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One wrong field of a document: where it is, what stands there and what was expected."""

    path: str
    message: str
    source: str = ""  # the file, where there is one
    line: int | None = None  # in the source, from 1


class SpecInvalid(InvalidInput):
    """A document has wrong fields; every one of them is named in ``problems``."""

    code = "invalid_spec"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(f"{p.path}: {p.message}" for p in problems), problems[0].path if problems else None)
        self.problems = tuple(problems)


class ContextLengthExceeded(InvalidInput):
    """Prompt and asked-for output don't fit into the model's context."""

    code = "context_length_exceeded"


class UnknownModel(InvalidInput):
    """No model of that name is served here."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class AlreadyRated(InvalidInput):
    """The decision has feedback with another score, which stands."""

    code = "already_rated"
    http_status = 409
    grpc_status = "ALREADY_EXISTS"


class UnsupportedModel(InvalidInput):
    """A checkpoint's family, or a field of its config that would change results, is not supported."""

    code = "unsupported_model"


class Unauthenticated(AntiphonError):
    """The caller presented no key, or a wrong one."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class PermissionDenied(AntiphonError):
    """The caller's key is good, but not for this."""

    code = "permission_denied"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class Overloaded(AntiphonError):
    """Refused early because queues are full; try again after ``retry_after_s`` seconds."""

    code = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(AntiphonError):
    """The caller went away or asked to stop."""

    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class DeadlineExceeded(AntiphonError):
    """The request's or an operation's deadline passed."""

    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Unavailable(AntiphonError):
    """Nobody can serve this now (starting, draining, lost); try again after ``retry_after_s`` seconds."""

    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PeerLost(Unavailable):
    """A peer of the data plane is gone; ``peer`` names it."""

    code = "peer_lost"

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"peer {peer} lost: {why}")
        self.peer = peer
        self.why = why


class LayoutMismatch(AntiphonError):
    """Two peers disagree about model, shard or buffer layout; the message says which fields differ."""

    code = "layout_mismatch"
    grpc_status = "FAILED_PRECONDITION"

    def __init__(self, peer: str, differences: Sequence[str]) -> None:
        super().__init__(f"layout of peer {peer} differs: " + "; ".join(differences))
        self.peer = peer
        self.differences = tuple(differences)


class CorruptMessage(AntiphonError):
    """A message of the data plane is not what its header promises."""

    code = "corrupt_message"
    grpc_status = "DATA_LOSS"

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"corrupt message from peer {peer}: {why}")
        self.peer = peer
        self.why = why


class CheckpointInvalid(AntiphonError):
    """A checkpoint directory lacks a file or tensor, or one has the wrong shape."""

    code = "checkpoint_invalid"
    grpc_status = "FAILED_PRECONDITION"


class InternalError(AntiphonError):
    """An invariant of ours does not hold; the message is for us, the caller sees only the code."""
