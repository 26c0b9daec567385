"""Steps beside each other: the batch in lanes, each with a step of its own in flight (step speed, no torch).

So the exchange does not stand still where a step ends.

    whole ──all decode, nobody could begin, the executor wants lanes──► in lanes ──somebody could begin, blocks are missing, the
      ▲                                                                    │        executor must rest──► draining
      └──────────────────────────── nothing is in flight ◄─────────────────┴──────────────────────────────────┘

    in lanes:   collect lane 0, update │ schedule and launch lane 0's next │ collect lane 1, update │ ...

A step has the requests that no other step has, as many as make lanes of one size; so lanes that requests left fill up again. Each
request has at most one step in flight and its tokens are known when it is decided: nothing of it depends on the other lanes.
Must not know: how steps are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from antiphon.core.request import RequestOutput
from antiphon.core.step import ModelRunnerOutput, SchedulerOutput
from antiphon.engine.scheduler import Scheduler


class Launched(Protocol):
    """A step that is being computed."""

    @property
    def step(self) -> SchedulerOutput:
        """Which."""
        ...


Lane = TypeVar("Lane", bound=Launched)


class LaneExecutor(Protocol[Lane]):
    """Computes several steps at once, of other requests each; collected in the order of their launches."""

    def num_lanes(self, num_requests: int) -> int:
        """Lanes that a batch of so many decodes is worth; 1: its steps are executed whole."""
        ...

    def launch(self, step: SchedulerOutput) -> Lane | None:
        """Begin to compute ``step`` beside what is in flight; None where it has to be executed, once nothing is."""
        ...

    def collect(self, lane: Lane) -> ModelRunnerOutput:
        """Compute on until that one is over; what came of it."""
        ...


class Lanes(Generic[Lane]):
    """Belongs to the engine's loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: LaneExecutor[Lane],
        *,
        update: Callable[[SchedulerOutput, ModelRunnerOutput], list[RequestOutput]],
        execute: Callable[[SchedulerOutput], list[RequestOutput]],
    ) -> None:
        """``update``: takes in what came of a step; ``execute``: computes one that can't be launched, and takes that in."""
        self._scheduler = scheduler
        self._executor = executor
        self._update, self._execute = update, execute
        self._flying: deque[Lane] = deque()  # oldest first

    def step(self) -> list[RequestOutput] | None:
        """Launch what can be, then collect one; None where nothing is in flight: the next step is a whole one."""
        scheduler, executor, flying = self._scheduler, self._executor, self._flying
        late: SchedulerOutput | None = None
        num_lanes = executor.num_lanes(scheduler.num_running)
        while late is None and 1 < num_lanes > len(flying):
            step = scheduler.schedule_beside(num_lanes)
            if step is None:
                break
            lane = executor.launch(step)
            if lane is None:
                late = step
            else:
                flying.append(lane)
        if late is None and not flying:
            return None
        outputs: list[RequestOutput] = []
        while flying:
            lane = flying.popleft()
            outputs += self._update(lane.step, executor.collect(lane))
            if late is None:
                return outputs
        assert late is not None
        return outputs + self._execute(late)
