"""Whole decode steps of a worker on a card that holds both halves, recorded once per number of rows and replayed (step).

    one step:   rows of the batch ──► pinned host memory ──► static tensors ──► replay of the smallest recording that fits
                                                                                embedding, every layer's halves, LM head, argmax

Rows that a recording has beyond the batch's stand for a token of a block that no request owns. Only what changed of the block
tables travels; each row's four numbers do in every step. The next step's numbers are written after this step's tokens were read,
so that nothing is overwritten while it is copied. Legend: T rows of a recording, R of the batch, M blocks, V vocabulary.
Must not know: requests, sampling, links.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from antiphon.device.graphs import Graphs, NotRecordable, Recorded
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, CardTables
from antiphon.models.cards.tuning import num_splits
from antiphon.models.decoder import AttentionHalves, FFNHalves, StepState
from antiphon.worker.batch_builder import Run

# Few enough to record in seconds; a batch between two of them computes at most half as many rows more.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_MOST_CHANGES = 4096  # of a table in one step; the whole table travels beyond
_MOST_DRAFTS = 64  # of one request in one step
_NO_TABLE: tuple[Sequence[int], int] = ((), 0)
_IDS, _POSITIONS, _SLOTS, _LENGTHS = range(4)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """What a replay left in the recording's own memory: true until the next one."""

    state: StepState  # of the batch's rows alone
    logits_RV: torch.Tensor  # fp32
    best_R: tuple[torch.Tensor, torch.Tensor]  # as ``AttentionHalves.greedy`` gives them


@dataclass(frozen=True, slots=True)
class _Recording:
    replayed: Recorded
    state: StepState
    logits_TV: torch.Tensor
    values_T: torch.Tensor
    ids_T: torch.Tensor


class DecodeGraphs:
    """Owns the static tensors and what was recorded on them. Not thread-safe: the worker's loop alone uses it."""

    def __init__(
        self,
        halves: AttentionHalves,
        ffn: FFNHalves,
        cache: KVCache,
        graphs: Graphs,
        *,
        max_rows: int,
        spare_block: int,
        return_dtype: torch.dtype,
    ) -> None:
        """``spare_block``: of the cache, no request's; ``return_dtype``: what the FFN half's results are rounded to."""
        self._halves, self._ffn, self._cache = halves, ffn, cache
        self._graphs = graphs
        self._return_dtype = return_dtype
        most = min(max_rows, _SIZES[-1])
        self._sizes = sorted({size for size in _SIZES if size < most} | {most})
        self._spare_block = spare_block
        device, width = halves.device, cache.layout.num_blocks_for(halves.max_model_len)
        pinned = device.type == "cuda"
        self._host_table = torch.full((most, width), spare_block, dtype=torch.int32, pin_memory=pinned)
        self._host_numbers = torch.zeros(4, most, dtype=torch.int64, pin_memory=pinned)
        self._table_TM = self._host_table.to(device)
        self._numbers = self._host_numbers.to(device)
        self._tables: list[tuple[Sequence[int], int]] = [_NO_TABLE] * most  # whose blocks each row has, and how many of them
        self._num_unsettled = cache.layout.num_blocks_for(_MOST_DRAFTS) + 1
        self._recordings: dict[int, _Recording] = {}
        self.num_replays = 0

    def record(self) -> None:
        """Record a step of every size, the largest first. What can't be recorded is computed eagerly, and the log says why."""
        self._send(self._fill([]))
        for size in reversed(self._sizes):
            try:
                with torch.inference_mode():
                    replayed, result = self._graphs.record(partial(self._compute, size))
            except NotRecordable as error:
                logger.warning("decode steps are not recorded, they are computed eagerly: %s", error)
                self._recordings.clear()
                return
            except torch.OutOfMemoryError:
                logger.warning("the card has no room for a recorded step of %d rows: larger batches are computed eagerly", size)
                continue
            self._recordings[size] = _Recording(replayed, *result)
        logger.info("recorded decode steps of %s rows", ", ".join(map(str, sorted(self._recordings))))

    def run(self, runs: Sequence[Run]) -> DecodeStep | None:
        """Compute one row of each run; None where no recording has room for them."""
        size = next((size for size in self._sizes if size >= len(runs) and size in self._recordings), None)
        if size is None:
            return None
        self._send(self._fill(runs))
        recording = self._recordings[size]
        recording.replayed.replay()
        self.num_replays += 1
        count, whole = len(runs), recording.state
        state = StepState(x_TD=whole.x_TD[:count], batch=whole.batch, rope_tables=whole.rope_tables)
        state.unseen = [(where, bad_T[:count]) for where, bad_T in whole.unseen]
        best = (recording.ids_T[:count], recording.values_T[:count])
        return DecodeStep(state=state, logits_RV=recording.logits_TV[:count], best_R=best)

    def _fill(self, runs: Sequence[Run]) -> list[tuple[int, int, Sequence[int]]]:
        """Write the host's numbers and table; what changed of the table, as (row, first column, blocks)."""
        size = self._cache.layout.block_size_tokens
        numbers, table = self._host_numbers.numpy(), self._host_table.numpy()
        numbers[:] = 0
        numbers[_SLOTS] = self._spare_block * size
        numbers[_LENGTHS] = 1
        changes: list[tuple[int, int, Sequence[int]]] = []
        for row, run in enumerate(runs):
            at = run.first_token
            numbers[:, row] = (run.token_ids[at], at, run.block_ids[at // size] * size + at % size, at + 1)
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

    def _send(self, changes: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self._numbers.copy_(self._host_numbers, non_blocking=True)
        if sum(len(blocks) for _, _, blocks in changes) > _MOST_CHANGES:
            self._table_TM.copy_(self._host_table, non_blocking=True)
        elif changes:
            width = self._table_TM.shape[1]
            places = [row * width + first + i for row, first, blocks in changes for i in range(len(blocks))]
            sent = torch.tensor([places, [block for _, _, blocks in changes for block in blocks]])
            if self._table_TM.device.type == "cuda":
                sent = sent.pin_memory()
            there = sent.to(self._table_TM.device, non_blocking=True)
            self._table_TM.view(-1).index_copy_(0, there[0], there[1].to(torch.int32))

    def _compute(self, size: int) -> tuple[StepState, torch.Tensor, torch.Tensor, torch.Tensor]:
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
        state = halves.begin(numbers[_IDS], batch)
        results: dict[int, torch.Tensor] = {}
        for layer in range(halves.config.num_layers):
            for out in halves.attend(layer, state, self._cache):
                ids, weights = (None, None) if out.routing is None else (out.routing.ids_TK, out.routing.weights_TK)
                results[out.stream] = self._ffn.compute(out.ffn, out.rows_TD, ids, weights).to(self._return_dtype)
            halves.combine(layer, state, [results[stream] for stream in halves.streams_due(layer)])
        logits_TV = halves.logits(state.x_TD)
        values_T, ids_T = logits_TV.max(dim=-1)
        return state, logits_TV, values_T, ids_T
