"""The engine core: schedule, execute, update (step speed); and the inbox that other threads may fill.

``step`` is the whole engine. With an executor that runs ahead (``engine.overlap``) a step that can be launched is, and the next is
decided and launched before its tokens are waited for; with one that computes several at once, the batch runs in lanes. Everything
else here is the hand-over between the loop that steps and those who submit.
Must not know: how tokens are computed (an Executor does), text, transports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from antiphon.core.errors import AntiphonError, ErrorInfo, Overloaded
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput
from antiphon.core.step import KVEvents, ModelRunnerOutput, SchedulerOutput
from antiphon.engine.limits import check_request
from antiphon.engine.overlap.beside import LaneExecutor, Lanes, Launched
from antiphon.engine.scheduler import Scheduler

Flying = TypeVar("Flying", bound="Launched")


class Executor(Protocol):
    """Computes steps; the attention worker is one."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step."""
        ...

    def poll_kv(self) -> KVEvents:
        """What the KV hand-off saw since last asked; never blocks."""
        ...


class AheadExecutor(Protocol[Flying]):
    """Computes steps while the engine goes on; at most two at once, collected in order."""

    def launch(self, step: SchedulerOutput, after: Flying | None) -> Flying | None:
        """Begin to compute ``step`` behind ``after``; None where it has to be executed, once ``after`` is collected."""
        ...

    def collect(self, launched: Flying) -> ModelRunnerOutput:
        """Wait for what came of it."""
        ...


Outbox = Callable[[Sequence[RequestOutput]], None]


def _nobody_sleeps() -> None:
    pass


class EngineCore(Generic[Flying]):
    """One engine. ``submit`` and ``abort`` may be called from any thread, everything else from the loop's own."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        outbox: Outbox,
        ahead: AheadExecutor[Flying] | None = None,
        lanes: LaneExecutor[Any] | None = None,
    ) -> None:
        """``ahead``: the executor where it launches steps behind each other; ``lanes``: where it does beside each other; None =
        each is waited for.
        """
        self.scheduler = scheduler
        self.wake: Callable[[], None] = _nobody_sleeps  # called, from any thread, when the inbox got something
        self._executor = executor
        self._ahead = ahead
        self._flying: Flying | None = None  # launched, not collected
        self._lanes = None if lanes is None else Lanes(scheduler, lanes, update=self._update, execute=self._execute)
        self._outbox = outbox
        self._inbox: deque[Request | RequestId | RequestOutput] = deque()
        self.num_steps = 0

    # ---- any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Hand a request to the loop; refusals come back as outputs.

        Raises:
            Overloaded: already when the inbox alone is past the queue's limit.
        """
        if len(self._inbox) > 2 * self.scheduler.config.max_queued_requests + 64:
            raise Overloaded("the engine's inbox is full")
        try:
            check_request(request, self.scheduler.config)  # here, and not in the loop: its time is the steps'
        except AntiphonError as error:
            self._inbox.append(_refusal(request, ErrorInfo.of(error)))
        else:
            self._inbox.append(request)
        self.wake()

    def abort(self, request_id: RequestId) -> None:
        """Ask the loop to end a request; its blocks are free within a step."""
        self._inbox.append(request_id)
        self.wake()

    # ---- the loop's own thread -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take the inbox, then schedule, execute, update; False when there was nothing to do."""
        self._take_inbox()
        self._take_kv()
        if self._ahead is not None and self._flying is not None:
            self._go_on(self._ahead, self._flying)
            return True
        if self._lanes is not None and (outputs := self._lanes.step()) is not None:
            if outputs:
                self._outbox(outputs)
            return True
        if not self.scheduler.has_requests:
            return False
        step = self.scheduler.schedule()
        outputs = self.scheduler.take_outputs()
        if step.has_work:
            self._flying = None if self._ahead is None else self._ahead.launch(step, None)
            if self._flying is None:
                outputs += self._execute(step)
            else:
                self.scheduler.in_flight.launched(step)
        if outputs:
            self._outbox(outputs)
        return bool(step.num_scheduled_tokens)

    def _go_on(self, ahead: AheadExecutor[Flying], flying: Flying) -> None:
        """Launch the step behind the one that is being computed, if it can be known; then wait for that one."""
        step = self.scheduler.schedule_ahead(flying.step)
        self._flying = None if step is None else ahead.launch(step, flying)
        outputs = self._update(flying.step, ahead.collect(flying))
        if step is not None and self._flying is None:
            outputs += self._execute(step)
        if outputs:
            self._outbox(outputs)

    def _execute(self, step: SchedulerOutput) -> list[RequestOutput]:
        return self._update(step, self._executor.execute(step))

    def _update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[RequestOutput]:
        self.num_steps += 1
        return self.scheduler.update(step, result)

    @property
    def has_inbox(self) -> bool:
        """True when something was submitted or aborted since the last step."""
        return bool(self._inbox)

    def _take_inbox(self) -> None:
        refused: list[RequestOutput] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                self.scheduler.abort([item])
                continue
            if isinstance(item, RequestOutput):
                refused.append(item)
                continue
            try:
                self.scheduler.add(item)
            except AntiphonError as error:
                refused.append(_refusal(item, ErrorInfo.of(error)))
            except Exception as error:  # noqa: BLE001 - a request that can't even be queued ends alone
                refused.append(_refusal(item, ErrorInfo.internal(f"{type(error).__name__} while it was queued")))
        if refused:
            self._outbox(refused)

    def _take_kv(self) -> None:
        events = self._executor.poll_kv()
        if not events.empty:
            self.scheduler.take_kv_events(events)


def _refusal(request: Request, error: ErrorInfo) -> RequestOutput:
    return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=error)
