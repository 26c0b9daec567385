"""A circuit breaker per expert: one that keeps failing is left alone for a while (request speed).

    CLOSED ── failures in a row ──► OPEN ── open_s passed ──► TRYING (one request) ── success ──► CLOSED
                                      ▲────────────────────────── failure ──┘

Ours rather than a library's: the clock is an argument, and a trial whose outcome never comes ends by it.
Must not know: what an expert is.
Belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """The circuit of one expert. ``clock`` is monotonic seconds."""

    def __init__(self, num_failures: int, open_s: float, clock: Callable[[], float]) -> None:
        self._limit = num_failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opened_s: float | None = None
        self._trying_since_s: float | None = None

    @property
    def is_open(self) -> bool:
        """True while nobody may be sent there: opened a short while ago, or one request is trying it out."""
        if self._opened_s is None:
            return False
        now_s = self._clock()
        if now_s - self._opened_s < self._open_s:
            return True
        # A trial whose outcome never came must not keep the circuit open for good.
        return self._trying_since_s is not None and now_s - self._trying_since_s < self._open_s

    def begin(self) -> None:
        """A request goes there; the first one after the open time is the trial."""
        if self._opened_s is not None:
            self._trying_since_s = self._clock()

    def succeeded(self) -> None:
        """It answered."""
        self._failures, self._opened_s, self._trying_since_s = 0, None, None

    def failed(self) -> None:
        """It did not, or not in time."""
        self._failures += 1
        self._trying_since_s = None
        if self._failures >= self._limit or self._opened_s is not None:
            self._opened_s = self._clock()
