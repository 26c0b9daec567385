"""Runs a step's plan, layer by layer and ubatch by ubatch: attend and send one, receive and combine another (hot).

Legend: T rows, D hidden. Must not know: requests, sampling, KV hand-offs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.models.prefetch import WeightPrefetch
from antiphon.telemetry.step_trace import Mark, StepTrace
from antiphon.worker.cards.split_graphs import ReplayedState, SplitGraphs
from antiphon.worker.ubatches.plan import Half, plan_ops

_REPEAT_SHIFT = 49  # of a step's number of 64 bits: above those that tell attempts after faults apart


@dataclass(slots=True, kw_only=True)
class LayerTimes:
    """Since start, in seconds of this worker's own clock."""

    attention_s: float = 0.0  # attention halves, and adding what comes back to their rows
    send_s: float = 0.0  # handing rows over


class LayerLoop:
    """Owns the plans, one for each number of ubatches, and what is in flight while tracing."""

    def __init__(
        self,
        halves: AttentionHalves,
        cache: KVCache,
        afd: AttentionSide,
        *,
        num_ubatches: int,
        warms: bool,
        times: LayerTimes,
        graphs: SplitGraphs | None = None,
    ) -> None:
        """``num_ubatches``: in flight at most; ``warms``: waits are for another processor, and this one fetches weights meanwhile;
        ``times``: added to; ``graphs``: ubatches of decodes alone are replayed from it, where it has room for them.
        """
        self.graphs = graphs
        self.times = times
        self.trace: StepTrace | None = None
        self._halves = halves
        self._cache = cache
        self._afd = afd
        self._num_ubatches = num_ubatches
        self._plans = {m: plan_ops(halves.config.num_layers, m) for m in range(1, num_ubatches + 1)}
        self._prefetch = WeightPrefetch(halves.first_weights) if warms else None
        self._away: dict[int, int] = {}  # place in flight → FFN layer, while tracing
        self._begun: list[tuple[torch.Tensor, AttentionBatch]] = []  # ubatches of the step, as they were taken in

    def begin(self, ubatch: int, token_ids_T: torch.Tensor, batch: AttentionBatch) -> StepState:
        """Take the rows of one ubatch in."""
        del self._begun[ubatch:]
        self._begun.append((token_ids_T, batch))
        state = None if self.graphs is None else self.graphs.begin(ubatch, token_ids_T, batch)
        return self._halves.begin(token_ids_T, batch) if state is None else state

    def run(self, step_id: int, states: list[StepState], attended: Callable[[int, int], None] | None) -> None:
        """Compute all layers of the ubatches; ``attended(layer, ubatch)`` is called when a layer's K and V are in the cache.

        States are others behind it where a lost FFN worker's answers were used too early and all was computed again.

        Raises:
            PeerLost: FFN workers that nobody replaces.
        """
        self._afd.ahead.begin()
        self._run(step_id, states, attended)
        while not self._afd.ahead.is_true():
            self._afd.abandon()
            self._afd.ahead.begin()
            states[:] = [self.begin(ubatch, *begun) for ubatch, begun in enumerate(tuple(self._begun))]
            # Late answers to what was given up are told by the number.
            self._run(step_id | self._afd.ahead.num_repeats % (1 << 15) << _REPEAT_SHIFT, states, attended)

    def _run(self, step_id: int, states: Sequence[StepState], attended: Callable[[int, int], None] | None) -> None:
        for op in self._plans[len(states)]:
            if op.half is Half.ATTEND:
                self.attend(step_id, op.layer, op.ubatch, states[op.ubatch])
                if attended is not None:
                    attended(op.layer, op.ubatch)
            else:
                self.combine(step_id, op.layer, op.ubatch, states[op.ubatch])

    def has_arrived(self, layer: int, ubatch: int) -> bool:
        """Whether ``combine`` would not wait."""
        return all(self._afd.has_arrived(stream * self._num_ubatches + ubatch) for stream in self._halves.streams_due(layer))

    def attend(self, step_id: int, layer: int, ubatch: int, state: StepState) -> None:
        """The attention half of a layer, its rows sent. Raises PeerLost as ``run``."""
        trace = self.trace
        start_s = time.perf_counter()
        if self.graphs is not None and isinstance(state, ReplayedState):
            leaving = self.graphs.attend(layer, state)
        else:
            leaving = self._halves.attend(layer, state, self._cache)
        attended_s = time.perf_counter()
        self.times.attention_s += attended_s - start_s
        for out in leaving:
            place = out.stream * self._num_ubatches + ubatch
            self._afd.send(step_id, out.ffn, place, out.rows_TD, out.routing)
            if trace is not None:
                self._away[place] = out.ffn
                trace.add(Mark.SEND, attended_s, time.perf_counter(), step_id, out.ffn, place)
        self.times.send_s += time.perf_counter() - attended_s
        if trace is not None:
            trace.add(Mark.ATTEND, start_s, attended_s, step_id, layer, ubatch, state.x_TD.shape[0])

    def combine(self, step_id: int, layer: int, ubatch: int, state: StepState) -> None:
        """Wait for what is due in a layer, and add it. Raises PeerLost as ``run``."""
        start_s = time.perf_counter()
        streams = self._halves.streams_due(layer)
        if self._prefetch is not None and layer + 1 < self._halves.config.num_layers:
            self._prefetch.warm(layer + 1, partial(self._afd.has_arrived, streams[-1] * self._num_ubatches + ubatch))
            self._afd.times.blocked_s += time.perf_counter() - start_s  # a wait, whatever it was used for
        results = [self._afd.receive(stream * self._num_ubatches + ubatch) for stream in streams]
        received_s = time.perf_counter()
        if self.graphs is not None and isinstance(state, ReplayedState):
            self.graphs.combine(layer, state, results)
        else:
            self._halves.combine(layer, state, results)
        combined_s = time.perf_counter()
        self.times.attention_s += combined_s - received_s
        if self.trace is not None:
            for stream in streams:
                place = stream * self._num_ubatches + ubatch
                self.trace.add(Mark.RECEIVE, start_s, received_s, step_id, self._away[place], place)
            self.trace.add(Mark.COMBINE, received_s, combined_s, step_id, layer, ubatch)
