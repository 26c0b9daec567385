"""Several steps of decodes at once, each of other requests: what one leaves of either side, another uses (hot).

    launch ──► begun ──► rows away ◄──combine, attend the next layer, send──┐
                            │  └──────────────(answered)────────────────────┘
                            └─(last layer)─► at the head, slice by slice ──► drawn ──collect──► over
    a fault anywhere: nothing is in flight any more, and each lane's step is executed by itself when it is collected
    nobody computes rows any more (PeerLost): the requests of all lanes end with that

Lanes that have been answered go first, so that the FFN side has rows; heads are computed while it does, and now and then even if it
waits, so that none stands still. A step cut into ubatches ends as one: while its head is computed the FFN side has nothing to do,
and this side nothing while its last layers are away. Lanes drift apart until both are busy.
Must not know: queues, blocks that are free.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.core.errors import ErrorInfo, PeerLost
from antiphon.core.step import ModelRunnerOutput, SchedulerOutput
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.models.head import SlicedHead
from antiphon.worker.fault_containment import FaultContainment
from antiphon.worker.layer_loop import LayerLoop
from antiphon.worker.request_row import Scheduled
from antiphon.worker.step_end import Gathered, StepEnd
from antiphon.worker.ubatches.plan import Segment
from antiphon.worker.ubatches.tuning import LaneTuner

_LAYERS_PER_SLICE = 4  # a head waits for so many layers of other lanes at most
_AGAIN = 1  # the attempt of a step that is executed after it fell out of its lane

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """A step in flight."""

    step: SchedulerOutput
    number: int  # its place among the exchanges
    batch: list[Scheduled]
    segments: list[Segment]
    state: StepState | None = None  # None: it fell
    layer: int = 0  # whose rows are away
    found: Gathered | None = None
    head: SlicedHead | None = None
    output: ModelRunnerOutput | None = None


class LaneRunner:
    """Belongs to the worker's loop; an ``engine.overlap.beside.LaneExecutor``."""

    def __init__(
        self,
        halves: AttentionHalves,
        layers: LayerLoop,
        afd: AttentionSide,
        step_end: StepEnd,
        contained: FaultContainment,
        *,
        most: int,
        is_tuned: bool,
        may_fly: Callable[[], bool],
        take: Callable[[SchedulerOutput], list[Scheduled]],
        begin: Callable[[Sequence[Scheduled], list[Segment]], StepState],
        over: Callable[[int, float, bool], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The worker's parts, and what it does for a lane.

        Args:
            most: lanes at most.
            is_tuned: how many is found out, else always as many.
            may_fly: whether nothing is due that wants the exchange at rest.
            take: takes in what a step changes; its requests.
            begin: takes in the rows of a lane.
            over: told of a step that is over its rows, its seconds, and whether others are in flight still.
        """
        self._halves, self._layers, self._afd = halves, layers, afd
        self._step_end, self._contained = step_end, contained
        self._most = most
        self._tuner = LaneTuner(most) if is_tuned else None
        self._may_fly, self._take, self._begin, self._over = may_fly, take, begin, over
        self._clock = clock
        self.flying: list[Lane] = []  # oldest first
        self._away: deque[Lane] = deque()  # in the order their rows left
        self._heads: deque[Lane] = deque()
        self._num_since_slice = 0
        self._collected_s = 0.0

    def num_lanes(self, num_requests: int) -> int:
        """Lanes that a batch of so many decodes is worth."""
        if self._tuner is None:
            return min(self._most, num_requests)
        return self._tuner.choose(num_requests)

    def executed(self, num_rows: int, start_s: float, end_s: float) -> None:
        """A step of decodes was executed whole."""
        if self._tuner is not None:
            self._tuner.executed(num_rows, start_s, end_s)

    def launch(self, step: SchedulerOutput) -> Lane | None:
        """Begin a step beside those in flight; None where it has to be executed, once nothing is."""
        if step.new_requests or step.drafts or step.states or step.kv_loads or step.kv_load_aborts or not self._may_fly():
            return None
        if any(lane.state is None for lane in self.flying):
            return None  # what fell is executed with all places of the exchange
        taken = {lane.number for lane in self.flying}
        number = next(number for number in range(self._most) if number not in taken)
        batch = self._take(step)
        segments = [segment for i, part in enumerate(batch) for segment in part.segments(i)]
        lane = Lane(step=step, number=number, batch=batch, segments=segments)
        if not self.flying:
            self._collected_s = self._clock()
            if self._tuner is not None:
                self._tuner.begin()
        self.flying.append(lane)
        try:
            with torch.inference_mode():
                lane.state = self._begin(batch, segments)
                self._send(lane, 0)
        except Exception as error:  # noqa: BLE001 - _fall says what becomes of it
            self._fall(error)
        return lane

    def collect(self, lane: Lane) -> ModelRunnerOutput:
        """Compute on until that lane's step is over; what came of it."""
        try:
            with torch.inference_mode():
                while lane.output is None and lane.state is not None:
                    self._go_on()
        except Exception as error:  # noqa: BLE001
            self._fall(error)
        output = lane.output
        if output is None:
            output = self._contained.run(lane.step.step_id, lane.batch, _AGAIN)
        else:
            self._contained.note(output)
        self.flying.remove(lane)
        now_s = self._clock()
        self._over(len(lane.batch), now_s - self._collected_s, bool(self.flying))
        self._collected_s = now_s
        if self._tuner is not None:
            self._tuner.collected(len(lane.batch), now_s)
        return output

    # ---- inside ------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """One layer of a lane, or one slice of a head."""
        front = self._away[0] if self._away else None
        if self._heads and (
            front is None or self._num_since_slice >= _LAYERS_PER_SLICE or not self._layers.has_arrived(front.layer, front.number)
        ):
            self._num_since_slice = 0
            self._slice(self._heads[0])
            return
        assert front is not None  # a lane that is collected is here or there
        self._num_since_slice += 1
        self._combine(front)

    def _combine(self, lane: Lane) -> None:
        assert lane.state is not None
        self._layers.combine(lane.step.step_id, lane.layer, lane.number, lane.state)
        self._away.popleft()
        if lane.layer + 1 < self._halves.config.num_layers:
            self._send(lane, lane.layer + 1)
            return
        lane.state.settle()
        found = lane.found = self._step_end.gather(lane.batch, [lane.segments], [lane.state])
        lane.head = self._halves.head.begin(found.joined(), best_only=found.needs_best_only)
        self._heads.append(lane)

    def _send(self, lane: Lane, layer: int) -> None:
        assert lane.state is not None
        self._layers.attend(lane.step.step_id, layer, lane.number, lane.state)
        lane.layer = layer
        self._away.append(lane)

    def _slice(self, lane: Lane) -> None:
        assert lane.head is not None
        assert lane.found is not None
        assert lane.state is not None
        start_s = time.perf_counter()
        is_over = lane.head.go_on()
        self._step_end.stats.head_s += time.perf_counter() - start_s
        if not is_over:
            return
        output = self._step_end.draw(lane.found, head=lane.head.result)
        lane.output = self._step_end.end(lane.batch, [lane.segments], [lane.state], lane.found, output)
        self._heads.popleft()

    def _fall(self, error: Exception) -> None:
        """What is in flight can't be gone on with."""
        self._afd.abandon()
        self._away.clear()
        self._heads.clear()
        for lane in self.flying:
            if lane.output is not None:
                continue
            lane.state = lane.found = lane.head = None
            if isinstance(error, PeerLost):
                lane.output = ModelRunnerOutput(errors={part.row.request_id: ErrorInfo.of(error) for part in lane.batch})
        if not isinstance(error, PeerLost):
            logger.error("%d steps in lanes failed; each is executed by itself", len(self.flying), exc_info=error)
