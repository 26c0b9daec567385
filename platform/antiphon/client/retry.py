"""When a call is tried again, and when it is not (request speed). Decides only; waiting is the caller's.

Tried again is what was refused or lost (UNAVAILABLE, RESOURCE_EXHAUSTED) before the first token; after it, the call goes on
behind the tokens that have come, where the policy says so. Pauses double and are drawn at random, so that clients that were
refused together do not come back together; a server that says when to come back is not asked earlier. Nothing outlives the
call's deadline.

Ours rather than a library's: what is asked again changes with what has come, and the server's word and the deadline bound pauses.
Must not know: connections, or what is asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from antiphon.core.errors import AntiphonError, DeadlineExceeded, Overloaded, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How patient a client is. ``RetryPolicy(max_attempts=1)`` never tries again."""

    max_attempts: int = 4
    initial_s: float = 0.1  # longest first pause
    max_s: float = 5.0  # longest pause, unless the server asks for more
    max_retry_after_s: float = 30.0  # a server that asks for a longer pause is not waited for
    resume: bool = True  # go on with an answer whose connection was lost; False = the application gets the error


class Attempts:
    """One call's attempts against its policy and deadline. Not shared between calls."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline_s = clock() + timeout_s
        self._num_failed = 0

    def timeout_s(self) -> float:
        """Seconds that the next attempt has.

        Raises:
            DeadlineExceeded: none.
        """
        left_s = self._deadline_s - self._clock()
        if left_s <= 0:
            raise DeadlineExceeded("the call's deadline passed")
        return left_s

    @property
    def may_resume(self) -> bool:
        """Whether an answer that has begun may go on over another connection."""
        return self._policy.resume

    def progressed(self) -> None:
        """Something came: failures before it don't count any more."""
        self._num_failed = 0

    def pause_s(self, error: AntiphonError) -> float:
        """Seconds to wait before the next attempt. Raises ``error`` when there should be none."""
        self._num_failed += 1
        if not isinstance(error, Overloaded | Unavailable) or self._num_failed >= self._policy.max_attempts:
            raise error
        if error.retry_after_s > self._policy.max_retry_after_s:
            raise error
        longest_s = min(self._policy.max_s, self._policy.initial_s * 2.0 ** (self._num_failed - 1))
        pause_s = error.retry_after_s + longest_s * (0.5 + 0.5 * self._draw())
        if self._clock() + pause_s >= self._deadline_s:
            raise error
        return pause_s
