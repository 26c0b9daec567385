"""Deciding when to try again, on an injected clock."""

from __future__ import annotations

import pytest

from antiphon.client.retry import Attempts, RetryPolicy
from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    Unavailable,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(clock: Clock, draw: float = 1.0, timeout_s: float = 60.0, **policy: float | int) -> Attempts:
    return Attempts(RetryPolicy(**policy), timeout_s, clock=clock, draw=lambda: draw)  # type: ignore[arg-type]


def test_pauses_double_up_to_their_limit() -> None:
    tries = attempts(Clock(), max_attempts=6, initial_s=0.1, max_s=0.5)
    pauses = [tries.pause_s(Unavailable("x", 0.0)) for _ in range(5)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_chance_takes_at_most_half_of_a_pause_away() -> None:
    assert attempts(Clock(), draw=0.0, initial_s=0.4).pause_s(Unavailable("x", 0.0)) == pytest.approx(0.2)
    assert attempts(Clock(), draw=1.0, initial_s=0.4).pause_s(Unavailable("x", 0.0)) == pytest.approx(0.4)


def test_a_server_is_not_asked_earlier_than_it_said() -> None:
    assert attempts(Clock(), draw=0.0).pause_s(Overloaded("x", 2.0)) >= 2.0


@pytest.mark.parametrize("error", [InvalidInput("x"), Cancelled("x"), DeadlineExceeded("x"), InternalError("x")])
def test_what_would_fail_again_is_not_tried_again(error: AntiphonError) -> None:
    with pytest.raises(type(error)):
        attempts(Clock()).pause_s(error)


def test_the_number_of_attempts_is_bounded() -> None:
    tries = attempts(Clock(), max_attempts=3)
    tries.pause_s(Unavailable("1", 0.0))
    tries.pause_s(Unavailable("2", 0.0))
    with pytest.raises(Unavailable, match="3"):
        tries.pause_s(Unavailable("3", 0.0))


def test_one_attempt_means_none_again() -> None:
    with pytest.raises(Unavailable):
        attempts(Clock(), max_attempts=1).pause_s(Unavailable("x", 0.0))


def test_a_pause_never_outlives_the_deadline() -> None:
    clock = Clock()
    tries = attempts(clock, timeout_s=1.0)
    clock.now_s += 0.95
    with pytest.raises(Unavailable):
        tries.pause_s(Unavailable("x", 0.0))


def test_each_attempt_has_what_is_left_of_the_deadline() -> None:
    clock = Clock()
    tries = attempts(clock, timeout_s=10.0)
    clock.now_s += 4.0
    assert tries.timeout_s() == pytest.approx(6.0)
    clock.now_s += 6.0
    with pytest.raises(DeadlineExceeded):
        tries.timeout_s()
