"""Requests that wait for a pool which sleeps at zero workers: how long, and how many (request speed).

    refused at once ◄── no time to wake, or too many wait ── nobody ready ── time to wake ──► held ── a worker is ready ──► placed
                                                                                                └── time is up ──► Unavailable

What is held shows in ``antiphon_requests_held``; whoever makes workers goes by it. Belongs to one event loop. Must not know: who
that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from antiphon.core.errors import Overloaded

MAX_HELD = 256  # of a model, as many as a worker queues by default: they all go to the first that wakes
_RETRY_AFTER_S = 10.0


class Waking:
    """Counts what is held.

    Args:
        timeouts_s: seconds that a request of a model may wait for a first worker; models that are not named never wait.
    """

    def __init__(self, timeouts_s: Mapping[str, float]) -> None:
        self._timeouts_s = dict(timeouts_s)
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> Mapping[str, int]:
        """Requests that wait now, by model; every model that may sleep is there."""
        return {model: self._held[model] for model in self._timeouts_s}

    def timeout_s(self, model: str) -> float:
        """How long a request may be held; 0 = it is refused."""
        return self._timeouts_s.get(model, 0.0)

    @contextmanager
    def hold(self, model: str) -> Iterator[None]:
        """A request waits inside.

        Raises:
            Overloaded: too many wait already.
        """
        if self._held[model] >= MAX_HELD:
            raise Overloaded(f"{MAX_HELD} requests wait for {model} to wake already", retry_after_s=_RETRY_AFTER_S)
        self._held[model] += 1
        try:
            yield
        finally:
            self._held[model] -= 1
