"""Whole decode steps of a worker on a card that holds both halves, recorded once per number of rows and replayed (step).

    one step:   rows of the batch ──► pinned host memory ──► static tensors ──► replay of the smallest recording that fits ──► told
                                      (two, in turns)                           embedding, every layer's halves, LM head, argmax;
                                                                                a second recording draws where rows are not greedy

A row's token id is the host's, or what a row of the step before drew, which the host need not know yet. Rows that a recording has
beyond the batch's stand for a token of a block that no request owns. Only what changed of the block tables travels; each row's
numbers do in every step.

Everything the card is asked for goes through one stream, so a step's inputs are written behind the step before; the
host's side of them alone could be overtaken, which is why there are two of it: a side is written again when its step is over.
Legend: T rows of a recording, R of the batch, M blocks, V vocabulary. Must not know: requests, sampling, links.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from antiphon.core.errors import InternalError
from antiphon.core.kv import KVLayout
from antiphon.device.graphs import Graphs, NotRecordable, Recorded
from antiphon.device.ready import DEADLINE_S, THERE, Ready
from antiphon.device.stream import Stream
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, CardTables
from antiphon.models.cards.tuning import num_splits
from antiphon.models.decoder import AttentionHalves, FFNHalves, StepState
from antiphon.worker.batch_builder import Run
from antiphon.worker.cards.drawing import GREEDY, NUM_SETTINGS, Draw, draw

# Few enough to record in seconds; a batch between two of them computes at most half as many rows more.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_MOST_CHANGES = 4096  # of a table in one step; the whole table travels beyond
_MOST_DRAFTS = 64  # of one request in one step
_ROW_BYTES = 1024  # of each row's numbers, in and out
_NO_TABLE: tuple[Sequence[int], int] = ((), 0)
_IDS, _POSITIONS, _SLOTS, _LENGTHS, _AFTER = range(5)
_DRAWN, _FINITE, _GATES = 0, 1, 2  # rows of what is told; gates follow one by one
NOBODY = -1  # no row of the step before: the token is known

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Side:
    """The host's memory of one step in flight."""

    numbers: torch.Tensor  # int64 [5, T]
    settings: torch.Tensor  # fp64 [5, T]
    told: torch.Tensor  # int64 [2 + gates, T]
    ready: Ready = THERE  # when its step is over


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A step that the card was asked for. Its side of the host's memory is its own until the step after the next is launched."""

    num_rows: int
    state: StepState  # of the batch's rows alone, in the recording's own memory: true until the next replay
    logits_RV: torch.Tensor  # fp32, likewise
    is_drawn: Sequence[bool]  # which rows' tokens are what requests want; of others the most likely one is told
    _side: _Side
    _gates: Sequence[str]

    def wait(self) -> None:
        """Until the step is over. Raises InternalError when the card does not end it."""
        if not self._side.ready.wait(DEADLINE_S):
            raise InternalError(f"the card has not computed a step within {DEADLINE_S:g} s")

    def tokens(self) -> list[int | None]:
        """What was drawn at each row, None where the logits are no numbers; after ``wait``."""
        drawn, finite = self._side.told[:_GATES, : self.num_rows].tolist()
        return [token_id if is_finite else None for token_id, is_finite in zip(drawn, finite, strict=True)]

    def bad_rows(self) -> dict[int, str]:
        """Rows that a gate found not to be numbers, and the first that did; after ``wait``."""
        found: dict[int, str] = {}
        for where, flags in zip(self._gates, self._side.told[_GATES:, : self.num_rows].tolist(), strict=False):
            for row in (row for row, is_bad in enumerate(flags) if is_bad):
                found.setdefault(row, where)
        return found


@dataclass(slots=True)
class _Recording:
    replayed: Recorded
    state: StepState
    gates: list[str]
    draws: dict[bool, Recorded] = field(default_factory=dict)  # by whether any row is cut


class DecodeGraphs:
    """Owns the static tensors and what was recorded on them. Not thread-safe: the worker's loop alone uses it."""

    def __init__(
        self,
        halves: AttentionHalves,
        ffn: FFNHalves,
        cache: KVCache,
        graphs: Graphs,
        stream: Stream,
        *,
        max_rows: int,
        spare_block: int,
        return_dtype: torch.dtype,
    ) -> None:
        """``spare_block``: of the cache, no request's; ``return_dtype``: what the FFN half's results are rounded to."""
        self._halves, self._ffn, self._cache = halves, ffn, cache
        self._graphs, self._stream = graphs, stream
        self._return_dtype = return_dtype
        most = self.most_rows(max_rows)
        self._sizes = sorted({size for size in _SIZES if size < most} | {most})
        self._spare_block = spare_block
        device, width = halves.device, cache.layout.num_blocks_for(halves.max_model_len)
        self._pinned = device.type == "cuda"
        self._sides = [self._side(most, len(halves.routers)) for _ in range(2)]
        first = self._sides[0]
        self._host_table = torch.full((most, width), spare_block, dtype=torch.int32, pin_memory=self._pinned)
        self._table_TM = self._host_table.to(device, copy=True)
        self._numbers, self._settings, self._told = (t.to(device, copy=True) for t in (first.numbers, first.settings, first.told))
        self._logits_TV = torch.empty(
            most, halves.config.vocab_size, dtype=torch.float32, device=device
        )  # of whichever was replayed
        self._last_T = torch.zeros(most, dtype=torch.int64, device=device)  # what it drew
        self._tables: list[tuple[Sequence[int], int]] = [_NO_TABLE] * most  # whose blocks each row has, and how many of them
        self._num_unsettled = cache.layout.num_blocks_for(_MOST_DRAFTS) + 1
        self._recordings: dict[int, _Recording] = {}
        self.num_replays = 0

    @staticmethod
    def most_rows(max_rows: int) -> int:
        """Rows of the largest recording where a batch has ``max_rows`` at most."""
        return min(max_rows, _SIZES[-1])

    @staticmethod
    def row_bytes(halves: AttentionHalves, layout: KVLayout) -> int:
        """What is kept on the card for each of them, beside what computing a step takes."""
        return 4 * (halves.config.vocab_size + layout.num_blocks_for(halves.max_model_len)) + _ROW_BYTES

    def record(self) -> None:
        """Record a step of every size, the largest first. What can't be recorded is computed eagerly, and the log says why."""
        with torch.inference_mode():
            self._send(self._sides[0], self._fill(self._sides[0], [], (), ()))
            self._sides[0].ready = self._stream.mark()
            self._sides[0].ready.wait(DEADLINE_S)
            for size in reversed(self._sizes):
                try:
                    replayed, state = self._graphs.record(partial(self._compute, size))
                    made = _Recording(replayed, state, [where for where, _ in state.unseen])
                    for cuts in (True, False):
                        made.draws[cuts], _ = self._graphs.record(partial(self._draw, size, cuts))
                except NotRecordable as error:
                    logger.warning("decode steps are not recorded, they are computed eagerly: %s", error)
                    self._recordings.clear()
                    return
                except torch.OutOfMemoryError:
                    logger.warning("the card has no room for a recorded step of %d rows: larger batches are computed eagerly", size)
                    continue
                self._recordings[size] = made
        logger.info("recorded decode steps of %s rows", ", ".join(map(str, sorted(self._recordings))))

    def has_room(self, num_rows: int) -> bool:
        """Whether a recording has so many rows."""
        return any(size >= num_rows for size in self._recordings)

    def launch(self, runs: Sequence[Run], draws: Sequence[Draw | None], after: Sequence[int] = ()) -> InFlight | None:
        """Ask for one row of each run, without waiting for anything but the step before the last; None where no recording has room.

        Args:
            runs: one token each.
            draws: how each row's token is chosen; None = elsewhere, from its logits.
            after: of each run, the row of the last launched step that draws its token, or NOBODY where that is known; () = of all.
        """
        size = next((size for size in self._sizes if size >= len(runs) and size in self._recordings), None)
        if size is None:
            return None
        side = self._sides[self.num_replays % 2]
        side.ready.wait(DEADLINE_S)
        recording, do = self._recordings[size], self._stream.do
        self._send(side, self._fill(side, runs, draws, after))
        do(recording.replayed.replay)
        if any(each is not None and each.temperature > 0.0 for each in draws):
            do(recording.draws[any(each is not None and each.is_cut for each in draws)].replay)
        do(partial(side.told.copy_, self._told, non_blocking=True))
        side.ready = self._stream.mark()
        self.num_replays += 1
        count, whole = len(runs), recording.state
        return InFlight(
            num_rows=count,
            state=StepState(x_TD=whole.x_TD[:count], batch=whole.batch, rope_tables=whole.rope_tables),
            logits_RV=self._logits_TV[:count],
            is_drawn=[each is not None for each in draws],
            _side=side,
            _gates=recording.gates,
        )

    def behind(self, work: Callable[[], object]) -> None:
        """Other work on the card, behind every step that was launched."""
        self._stream.do(work)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _side(self, most: int, num_gates: int) -> _Side:
        def zeros(rows: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, most, dtype=dtype, pin_memory=self._pinned)

        numbers, told = zeros(_AFTER + 1, torch.int64), zeros(_GATES + num_gates, torch.int64)
        return _Side(numbers=numbers, settings=zeros(NUM_SETTINGS, torch.float64), told=told)

    def _fill(
        self, side: _Side, runs: Sequence[Run], draws: Sequence[Draw | None], after: Sequence[int]
    ) -> list[tuple[int, int, Sequence[int]]]:
        """Write the host's numbers and table; what changed of the table, as (row, first column, blocks)."""
        size = self._cache.layout.block_size_tokens
        numbers, settings, table = side.numbers.numpy(), side.settings.numpy(), self._host_table.numpy()
        numbers[:] = 0
        numbers[_SLOTS] = self._spare_block * size
        numbers[_LENGTHS] = 1
        numbers[_AFTER] = NOBODY
        settings[:] = 0.0
        changes: list[tuple[int, int, Sequence[int]]] = []
        for row, run in enumerate(runs):
            at = run.first_token
            before_row = after[row] if after else NOBODY
            token_id = run.token_ids[at] if before_row == NOBODY else 0
            numbers[:, row] = (token_id, at, run.block_ids[at // size] * size + at % size, at + 1, before_row)
            settings[:, row] = draws[row] or GREEDY
            count, (before, num_before) = at // size + 1, self._tables[row]
            # Blocks of drafts that were wrong are others by now; what is further back stays with a request for as long as it runs.
            first = max(0, min(count, num_before) - self._num_unsettled) if run.block_ids is before else 0
            blocks = list(run.block_ids[first:count])
            self._tables[row] = (run.block_ids, count)
            if run.block_ids is not before or table[row, first:count].tolist() != blocks:
                table[row, first:count] = blocks
                changes.append((row, first, blocks))
        for row in range(len(runs), len(self._tables)):
            if self._tables[row] != _NO_TABLE:
                self._tables[row] = _NO_TABLE
                table[row, 0] = self._spare_block
                changes.append((row, 0, [self._spare_block]))
        return changes

    def _send(self, side: _Side, changes: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        do = self._stream.do
        do(partial(self._numbers.copy_, side.numbers, non_blocking=True))
        do(partial(self._settings.copy_, side.settings, non_blocking=True))
        if sum(len(blocks) for _, _, blocks in changes) > _MOST_CHANGES:
            do(partial(self._table_TM.copy_, self._for_card(self._host_table.clone()), non_blocking=True))
        elif changes:
            width = self._table_TM.shape[1]
            places = [row * width + first + i for row, first, blocks in changes for i in range(len(blocks))]
            sent = self._for_card(torch.tensor([places, [block for _, _, blocks in changes for block in blocks]]))
            do(partial(self._change_table, sent))

    def _for_card(self, made: torch.Tensor) -> torch.Tensor:
        return made.pin_memory() if self._pinned else made

    def _change_table(self, sent: torch.Tensor) -> None:
        there = sent.to(self._table_TM.device, non_blocking=True)
        self._table_TM.view(-1).index_copy_(0, there[0], there[1].to(torch.int32))

    def _compute(self, size: int) -> StepState:
        halves, numbers = self._halves, self._numbers[:, :size]
        none = numbers[0, :0]
        heads = max((plane.num_heads for plane in self._cache.layout.planes[:1]), default=1)
        batch = AttentionBatch(
            positions_T=numbers[_POSITIONS],
            slots_T=numbers[_SLOTS],
            block_size_tokens=self._cache.layout.block_size_tokens,
            decode_blocks_BM=self._table_TM[:size],
            decode_lens_B=numbers[_LENGTHS],
            chunks=(),
            card=CardTables(
                num_parts=num_splits(size, heads, halves.max_model_len),
                chunk_blocks_CM=self._table_TM[:0],
                first_rows_C=none,
                num_rows_C=none,
                num_past_C=none,
                max_rows=0,
            ),
        )
        after_T = numbers[_AFTER]
        drawn_T = self._last_T.index_select(0, after_T.clamp(min=0))
        state = halves.begin(torch.where(after_T < 0, numbers[_IDS], drawn_T), batch)
        results: dict[int, torch.Tensor] = {}
        for layer in range(halves.config.num_layers):
            for out in halves.attend(layer, state, self._cache):
                ids, weights = (None, None) if out.routing is None else (out.routing.ids_TK, out.routing.weights_TK)
                results[out.stream] = self._ffn.compute(out.ffn, out.rows_TD, ids, weights).to(self._return_dtype)
            halves.combine(layer, state, [results[stream] for stream in halves.streams_due(layer)])
        self._logits_TV[:size].copy_(halves.logits(state.x_TD))
        values_T, ids_T = self._logits_TV[:size].max(dim=-1)
        told = self._told[:, :size]
        told[_FINITE].copy_(torch.isfinite(values_T))
        for number, (_, bad_T) in enumerate(state.unseen):
            told[_GATES + number].copy_(bad_T)
        self._tell(size, ids_T)
        return state

    def _draw(self, size: int, cuts: bool) -> None:
        best_T = self._told[_DRAWN, :size]
        self._tell(size, draw(self._logits_TV[:size], best_T, self._settings[:, :size], cuts=cuts))

    def _tell(self, size: int, ids_T: torch.Tensor) -> None:
        self._told[_DRAWN, :size].copy_(ids_T)
        self._last_T[:size].copy_(ids_T)
