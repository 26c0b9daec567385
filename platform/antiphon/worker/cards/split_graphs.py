"""Decode steps of an attention worker on a card whose FFN halves are elsewhere: recorded between exchanges, and replayed (step).

    turn 0        embedding, attention half of layer 0, gate               ──► rows that leave
    turn l        results ──► residual add, attention half of layer l, gate ──► rows that leave
    turn L        results ──► residual add

One recording per turn, lane and number of rows. A lane is a ubatch's place among those in flight: each has memory of its own, since
one lane's rows are away while the next lane computes. Between two turns the host sends and receives as it does without recordings,
so that whoever computes the other half, on a card or not, and whoever replaces it when it is lost, needs to know nothing of this:
rows that left stay where they are until the lane's next turn. Rows that a recording has beyond the ubatch's stand for a token of a
block that no request owns; they do not travel.

Legend: T rows of a recording, M blocks, D hidden. Must not know: links, requests, sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from antiphon.device.graphs import Graphs, NotRecordable, Recorded
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, CardTables
from antiphon.models.cards.tuning import num_splits
from antiphon.models.decoder import AttentionHalves, Outgoing, StepState

# Fewer than whole steps have: there is a recording for every layer of each.
_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
_IDS, _POSITIONS, _SLOTS, _LENGTHS = range(4)

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ReplayedState(StepState):
    """A ubatch's state in the memory of a lane's recordings: true until the lane's next step."""

    turns: Sequence[_Turn]
    results: Sequence[torch.Tensor]  # by stream, [T, D]: where the next turn reads them


@dataclass(frozen=True, slots=True)
class _Turn:
    replayed: Recorded
    state: StepState
    leaving: Sequence[Outgoing]


class _Lane:
    """What the recordings of one lane read, for as many rows as it may have."""

    def __init__(self, halves: AttentionHalves, cache: KVCache, most: int, spare_block: int, return_dtype: torch.dtype) -> None:
        layout, device = cache.layout, halves.device
        blank = torch.zeros(4, most, dtype=torch.int64)
        blank[_SLOTS] = spare_block * layout.block_size_tokens
        blank[_LENGTHS] = 1
        self.most = most
        self.spare_block = spare_block
        self.blank = blank.to(device)
        self.numbers = self.blank.clone()
        width = layout.num_blocks_for(halves.max_model_len)
        self.table_TM = torch.full((most, width), spare_block, dtype=torch.int32, device=device)
        streams = range(halves.config.num_streams)
        self.results = [torch.zeros(most, halves.config.hidden_size, dtype=return_dtype, device=device) for _ in streams]
        self.recordings: dict[int, Sequence[_Turn]] = {}

    def fill(self, ids_T: torch.Tensor, batch: AttentionBatch, size: int) -> None:
        """Write a ubatch's rows, and blank ones behind them; everything is on the card already."""
        assert batch.decode_blocks_BM is not None
        assert batch.decode_lens_B is not None
        count, width = batch.decode_blocks_BM.shape[0], min(self.table_TM.shape[1], batch.decode_blocks_BM.shape[1])
        self.numbers[:, :count].copy_(torch.stack((ids_T, batch.positions_T, batch.slots_T, batch.decode_lens_B)))
        self.table_TM[:count, :width].copy_(batch.decode_blocks_BM[:, :width])
        if count < size:
            self.numbers[:, count:size].copy_(self.blank[:, count:size])
            self.table_TM[count:size, 0].fill_(self.spare_block)


class SplitGraphs:
    """Owns the lanes. Stands between the layer loop and the attention halves. Not thread-safe: the worker's loop alone uses it."""

    def __init__(
        self,
        halves: AttentionHalves,
        cache: KVCache,
        graphs: Graphs,
        *,
        max_rows: int,
        num_lanes: int,
        spare_block: int,
        return_dtype: torch.dtype,
    ) -> None:
        """``max_rows``: decodes of a step at most, shared out evenly among the lanes in use; ``num_lanes``: ubatches in flight at
        most; ``spare_block``: of the cache, no request's; ``return_dtype``: what the FFN side's results are in.
        """
        self._halves, self._cache, self._graphs = halves, cache, graphs
        self._lanes = [
            _Lane(halves, cache, min(-(-max_rows // (lane + 1)), _SIZES[-1]), spare_block, return_dtype)
            for lane in range(num_lanes)
        ]
        self.num_replays = 0  # of turns

    def record(self) -> None:
        """Record every lane's turns, the largest first. What can't be recorded is computed eagerly, and the log says why."""
        for number, lane in enumerate(self._lanes):
            for size in sorted({size for size in _SIZES if size < lane.most} | {lane.most}, reverse=True):
                try:
                    lane.recordings[size] = self._record(lane, size)
                except NotRecordable as error:
                    logger.warning("attention halves are not recorded, they are computed eagerly: %s", error)
                    for other in self._lanes:
                        other.recordings.clear()
                    return
                except torch.OutOfMemoryError:
                    logger.warning("the card has no room for recordings of %d rows in lane %d: they are eager", size, number)
            sizes = ", ".join(map(str, sorted(lane.recordings)))
            logger.info("recorded %d turns of %s rows in lane %d", self._halves.config.num_layers + 1, sizes, number)

    def begin(self, lane: int, ids_T: torch.Tensor, batch: AttentionBatch) -> ReplayedState | None:
        """Take a ubatch in; None where it is not one of decodes alone, or no recording has room for it."""
        count = batch.num_decodes
        if count != ids_T.shape[0] or batch.states is not None or lane >= len(self._lanes):
            return None
        whole = self._lanes[lane]
        size = min((size for size in whole.recordings if size >= count), default=None)
        if size is None:
            return None
        whole.fill(ids_T, batch, size)
        turns = whole.recordings[size]
        return ReplayedState(
            x_TD=turns[-1].state.x_TD[:count],
            batch=batch,
            rope_tables=(),
            turns=turns,
            results=[result_TD[:count] for result_TD in whole.results],
        )

    def attend(self, layer: int, state: ReplayedState) -> Sequence[Outgoing]:
        """See ``AttentionHalves.attend``; adds the results of the layer before to the rows first."""
        turn, count = self._replay(layer, state), state.x_TD.shape[0]
        return [
            Outgoing(
                ffn=out.ffn,
                stream=out.stream,
                rows_TD=out.rows_TD[:count],
                routing=None
                if out.routing is None
                else replace(out.routing, ids_TK=out.routing.ids_TK[:count], weights_TK=out.routing.weights_TK[:count]),
            )
            for out in turn.leaving
        ]

    def combine(self, layer: int, state: ReplayedState, results: Sequence[torch.Tensor]) -> None:
        """See ``AttentionHalves.combine``: here they are put where the next turn reads them, which is the last one's own."""
        for stream, result_TD in zip(self._halves.streams_due(layer), results, strict=True):
            state.results[stream].copy_(result_TD)
        if layer + 1 == self._halves.config.num_layers:
            self._replay(layer + 1, state)

    def _replay(self, number: int, state: ReplayedState) -> _Turn:
        turn, count = state.turns[number], state.x_TD.shape[0]
        turn.replayed.replay()
        self.num_replays += 1
        state.unseen += [(where, bad_T[:count]) for where, bad_T in turn.state.unseen]
        return turn

    def _record(self, lane: _Lane, size: int) -> Sequence[_Turn]:
        turns: list[_Turn] = []
        state = None
        for number in range(self._halves.config.num_layers + 1):
            with torch.inference_mode():
                replayed, (state, leaving) = self._graphs.record(partial(self._turn, number, lane, size, state))
            turns.append(_Turn(replayed, state, leaving))
        return turns

    def _turn(self, number: int, lane: _Lane, size: int, before: StepState | None) -> tuple[StepState, Sequence[Outgoing]]:
        """What one turn computes. May run several times before it is replayed: it changes no state but its own."""
        halves = self._halves
        if before is None:
            state = halves.begin(lane.numbers[_IDS, :size], self._batch(lane, size))
        else:
            state = replace(before, away=list(before.away), unseen=[])
            due = halves.streams_due(number - 1)
            halves.combine(number - 1, state, [lane.results[stream][:size] for stream in due])
        return state, halves.attend(number, state, self._cache) if number < halves.config.num_layers else ()

    def _batch(self, lane: _Lane, size: int) -> AttentionBatch:
        layout, numbers = self._cache.layout, lane.numbers[:, :size]
        none = numbers[0, :0]
        heads = max((plane.num_heads for plane in layout.planes[:1]), default=1)
        return AttentionBatch(
            positions_T=numbers[_POSITIONS],
            slots_T=numbers[_SLOTS],
            block_size_tokens=layout.block_size_tokens,
            decode_blocks_BM=lane.table_TM[:size],
            decode_lens_B=numbers[_LENGTHS],
            chunks=(),
            card=CardTables(
                num_parts=num_splits(size, heads, self._halves.max_model_len),
                chunk_blocks_CM=lane.table_TM[:0],
                first_rows_C=none,
                num_rows_C=none,
                num_past_C=none,
                max_rows=0,
            ),
        )
