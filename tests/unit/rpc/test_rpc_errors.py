"""Errors and grpc statuses."""

from __future__ import annotations

import grpc
import pytest

from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    CheckpointInvalid,
    ContextLengthExceeded,
    CorruptMessage,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    LayoutMismatch,
    Overloaded,
    PeerLost,
    Problem,
    SpecInvalid,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnsupportedModel,
)
from antiphon.rpc.errors import error_from_call, error_of, status_of, unreachable


class FailedCall(grpc.RpcError):
    """What a client gets, made from a server's status."""

    def __init__(self, error: AntiphonError) -> None:
        self._status = status_of(error)

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._status.trailing_metadata


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("no", "a.b[0]"),
        ContextLengthExceeded("too long", "prompt"),
        UnknownModel("who", "model"),
        UnsupportedModel("what"),
        Unauthenticated("key"),
        Overloaded("full", 2.5),
        Cancelled("gone"),
        DeadlineExceeded("late"),
        Unavailable("starting", 4.0),
        CheckpointInvalid("hole"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_as_itself(error: AntiphonError) -> None:
    back = error_from_call(FailedCall(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert getattr(back, "field", None) == getattr(error, "field", None)
    assert getattr(back, "retry_after_s", None) == getattr(error, "retry_after_s", None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SpecInvalid([Problem(path="x", message="y")]), InvalidInput),
        (PeerLost("w", "died"), Unavailable),
        (LayoutMismatch("w", ["a"]), InternalError),
        (CorruptMessage("w", "bits"), InternalError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AntiphonError) else value.__name__,
)
def test_an_error_with_a_richer_constructor_comes_back_as_its_nearest_relative(
    error: AntiphonError, kind: type[AntiphonError]
) -> None:
    assert type(error_from_call(FailedCall(error))) is kind


def test_every_error_of_the_tree_has_a_status_of_grpc() -> None:
    waiting = [AntiphonError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        assert kind.grpc_status in grpc.StatusCode.__members__


def test_the_message_of_an_internal_error_stays_inside() -> None:
    assert "secret" not in status_of(InternalError("secret path")).message


def test_a_field_with_any_characters_survives_the_metadata() -> None:
    back = error_from_call(FailedCall(InvalidInput("no", "naïve\n键")))
    assert isinstance(back, InvalidInput)
    assert back.field == "naïve\n键"


def test_a_code_nobody_knows_is_an_internal_error() -> None:
    assert type(error_of("no_such_code", "hm")) is InternalError


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Failed to connect: Connection refused",
            "connection refused",
        ),
        ("DNS resolution failed for nowhere:9: C-ares status is not ARES_SUCCESS", "there is no host of that name"),
        ("Socket closed", "the connection was lost"),
        ("every worker is draining", None),
    ],
)
def test_grpcs_words_about_a_connection_become_a_persons(details: str, words: str | None) -> None:
    assert unreachable("host:9", details) == (None if words is None else f"no connection to host:9: {words}")
