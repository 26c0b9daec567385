"""Which requests are late, looked for only when one may be (step speed).

Must not know: queues, what becomes of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from antiphon.core.errors import DeadlineExceeded, ErrorInfo
from antiphon.engine.request_state import RequestState

TOO_LATE = ErrorInfo(code=DeadlineExceeded.code, message="deadline exceeded")


class Deadlines:
    """Owns the earliest deadline of the requests it was told of; those that end early only make it look once too often."""

    def __init__(self) -> None:
        self._next_s: float | None = None

    def note(self, deadline_s: float | None) -> None:
        """A request came; None = it may take for ever."""
        if deadline_s is not None:
            self._next_s = deadline_s if self._next_s is None else min(self._next_s, deadline_s)

    def late(self, states: Iterable[RequestState], now_s: float) -> list[RequestState]:
        """Those of ``states``, which are all there are, whose deadline has passed; they are gone when it is asked again."""
        if self._next_s is None or now_s < self._next_s:
            return []
        late: list[RequestState] = []
        left: list[float] = []
        for state in states:
            deadline_s = state.request.deadline_s
            if deadline_s is None:
                continue
            if deadline_s <= now_s:
                late.append(state)
            else:
                left.append(deadline_s)
        self._next_s = min(left, default=None)
        return late
