"""The engine of encoders: whole texts in, vectors out, as many at once as a step's tokens allow (step speed).

    submit ──► queue, by (priority, arrival) ──► one batch a step ──► vector, finished

There is no KV cache, so nothing is kept, preempted or resumed. Must not know: how vectors are computed.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence

from antiphon.core.errors import DeadlineExceeded, ErrorInfo, Overloaded
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, RequestTimes
from antiphon.engine.core import Outbox
from antiphon.engine.limits import SchedulerConfig, SchedulerStats, check_request

Compute = Callable[[Sequence[Request]], Sequence[tuple[float, ...] | ErrorInfo]]  # one vector, or why there is none, each


def _nobody_sleeps() -> None:
    pass


class BatchEngine:
    """``submit`` and ``abort`` may be called from any thread, everything else from the loop's own.

    Args:
        config: its limits; blocks are not used.
        compute: makes the vectors of a batch.
        outbox: takes what came of a step.
        clock: monotonic seconds.
        check: refuses requests that the model can't take; any thread.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        compute: Compute,
        outbox: Outbox,
        clock: Callable[[], float],
        check: Callable[[Request], None],
    ) -> None:
        self.config = config
        self.stats = SchedulerStats()
        self.wake: Callable[[], None] = _nobody_sleeps
        self.num_steps = 0
        self.num_running = 0
        self._compute = compute
        self._outbox = outbox
        self._clock = clock
        self._check = check
        self._inbox: deque[Request | RequestId] = deque()
        self._waiting: list[Request] = []

    # ---- any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Hand a request to the loop.

        Raises:
            InvalidInput: it can't be computed.
            Overloaded: too many wait.
        """
        check_request(request, self.config)
        self._check(request)
        if len(self._inbox) + len(self._waiting) >= self.config.max_queued_requests:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already", retry_after_s=1.0)
        self._inbox.append(request)
        self.wake()

    def abort(self, request_id: RequestId) -> None:
        """Forget a request; an unknown id is ignored."""
        self._inbox.append(request_id)
        self.wake()

    @property
    def has_inbox(self) -> bool:
        """True when something was submitted or aborted since the last step."""
        return bool(self._inbox)

    # ---- the loop's own thread -----------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that no step has taken."""
        return len(self._waiting)

    @property
    def has_requests(self) -> bool:
        """True while one is not answered."""
        return bool(self._waiting or self._inbox)

    def step(self) -> bool:
        """Take the inbox, then compute one batch; False when there was nothing to do."""
        self._take_inbox()
        now_s = self._clock()
        batch, late = self._next_batch(now_s)
        outputs = [_end(request, _TOO_LATE, now_s) for request in late]
        if batch:
            self.num_running = len(batch)
            made = self._compute(batch)
            self.num_running = 0
            self.num_steps += 1
            end_s = self._clock()
            for request, vector in zip(batch, made, strict=True):
                self.stats.num_prompt_tokens += len(request.prompt_token_ids)
                outputs.append(_end(request, vector, end_s, started_s=now_s))
        if outputs:
            self._outbox(outputs)
        return bool(outputs)

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                self._waiting = [request for request in self._waiting if request.request_id != item]
            else:
                bisect.insort(self._waiting, item, key=lambda request: (request.priority, request.arrival_s))

    def _next_batch(self, now_s: float) -> tuple[list[Request], list[Request]]:
        """The requests of this step, at least one whatever its length, and those that are too late."""
        late = [request for request in self._waiting if request.deadline_s is not None and request.deadline_s <= now_s]
        waiting = [request for request in self._waiting if request not in late] if late else self._waiting
        num_tokens = count = 0
        for request in waiting[: self.config.max_num_seqs]:
            num_tokens += len(request.prompt_token_ids)
            if count and num_tokens > self.config.max_num_batched_tokens:
                break
            count += 1
        self._waiting = waiting[count:]
        return waiting[:count], late


_TOO_LATE = ErrorInfo(code=DeadlineExceeded.code, message="deadline exceeded")


def _end(request: Request, made: tuple[float, ...] | ErrorInfo, now_s: float, started_s: float | None = None) -> RequestOutput:
    error = made if isinstance(made, ErrorInfo) else None
    reason = FinishReason.LENGTH if error is None else FinishReason.ABORT if error is _TOO_LATE else FinishReason.ERROR
    return RequestOutput(
        request_id=request.request_id,
        finish_reason=reason,
        error=error,
        vector=() if isinstance(made, ErrorInfo) else made,
        times=RequestTimes(arrival_s=request.arrival_s, scheduled_s=started_s, first_token_s=now_s, finished_s=now_s),
        traceparent=request.traceparent,
    )
