"""Lays the rows of one ubatch out for the attention halves: ids, positions, slots, contexts, where the worker computes (step).

On a CPU each becomes a tensor of its own. For a card everything is written into one piece of host memory and travels in one copy,
and the blocks of contexts travel instead of their slots. Must not know: what is computed, requests' sampling, links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from antiphon.device.device import is_card
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, CardTables, Chunk
from antiphon.models.attention.states import StateBatch, StateRun
from antiphon.models.cards.tuning import num_splits

_CARD_TABLE_BLOCKS = 64  # tables on a card are as wide as a multiple of this: few shapes, and none that follows a length closely


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Rows of one request in one ubatch: tokens [first_token, first_token + num_tokens) of ``token_ids``."""

    token_ids: Sequence[int]
    block_ids: Sequence[int]
    first_token: int
    num_tokens: int
    state: StateRun | None = None  # where the model has layers with a state

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.first_token + self.num_tokens


class BatchBuilder:
    """Makes (token ids, batch) of runs; decodes come first. ``max_context``: the longest that is served."""

    def __init__(self, cache: KVCache, device: torch.device, max_context: int, *, with_slots: bool) -> None:
        """``with_slots``: the slots of prefill chunks' contexts are read one by one, on a card too."""
        self._with_slots = with_slots
        self._cache = cache
        self._device = device
        self._max_context = max_context
        self._on_card = is_card(device)

    def build(self, runs: Sequence[Run]) -> tuple[torch.Tensor, AttentionBatch]:
        """Token ids, int64 [T], and where their rows stand in the cache."""
        num_decodes = next((i for i, run in enumerate(runs) if run.num_tokens != 1), len(runs))
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        size = self._cache.layout.block_size_tokens
        for run in runs:
            token_ids += run.token_ids[run.first_token : run.end]
            positions += range(run.first_token, run.end)
            slots += [run.block_ids[t // size] * size + t % size for t in range(run.first_token, run.end)]
        if self._on_card:
            return self._for_card(runs, num_decodes, token_ids, positions, slots)
        decode_blocks = decode_lens = None
        if num_decodes:
            decodes = runs[:num_decodes]
            decode_lens = torch.tensor([run.end for run in decodes])
            num_blocks = -(-int(decode_lens.max()) // size)
            decode_blocks = _tables(decodes, num_blocks)
        chunks: list[Chunk] = []
        first_row = num_decodes
        for run in runs[num_decodes:]:
            context = self._cache.slots(run.block_ids, 0, run.end)
            chunks.append(Chunk(first_row=first_row, num_rows=run.num_tokens, context_slots=context))
            first_row += run.num_tokens
        batch = AttentionBatch(
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            block_size_tokens=size,
            decode_blocks_BM=decode_blocks,
            decode_lens_B=decode_lens,
            chunks=chunks,
            states=self._states(runs),
        )
        return torch.tensor(token_ids), batch

    def _states(self, runs: Sequence[Run]) -> StateBatch | None:
        if not self._cache.layout.has_state:
            return None
        states = [run.state for run in runs if run.state is not None]
        assert len(states) == len(runs)  # the engine plans a state for every request it schedules
        return StateBatch.lay_out(states, self._device)

    def _for_card(
        self, runs: Sequence[Run], num_decodes: int, token_ids: list[int], positions: list[int], slots: list[int]
    ) -> tuple[torch.Tensor, AttentionBatch]:
        size = self._cache.layout.block_size_tokens
        longest = -(-max(run.end for run in runs) // size)
        width = -(-longest // _CARD_TABLE_BLOCKS) * _CARD_TABLE_BLOCKS
        num_rows, num_chunks = len(token_ids), len(runs) - num_decodes
        numbers = [*token_ids, *positions, *slots, *(run.end for run in runs[:num_decodes])]
        first_row = 0  # of each chunk, among the rows behind the decodes
        first_rows = []
        for run in runs[num_decodes:]:
            first_rows.append(first_row)
            first_row += run.num_tokens
        numbers += first_rows
        numbers += [run.num_tokens for run in runs[num_decodes:]]
        numbers += [run.first_token for run in runs[num_decodes:]]
        for run in runs:
            numbers += _padded(run.block_ids, width)
        host = torch.tensor(numbers, dtype=torch.int64)
        if self._device.type == "cuda":
            host = host.pin_memory()
        packed = host.to(self._device, non_blocking=True)
        sizes = [num_rows, num_rows, num_rows, num_decodes, num_chunks, num_chunks, num_chunks, len(runs) * width]
        ids_T, positions_T, slots_T, lens_B, first_C, rows_C, past_C, blocks = packed.split_with_sizes(sizes)
        blocks_RM = blocks.view(len(runs), width).to(torch.int32)
        chunks: list[Chunk] = []
        within = torch.arange(size, device=self._device)
        for i, run in enumerate(runs[num_decodes:] if self._with_slots else ()):
            context = (blocks_RM[num_decodes + i].long()[:, None] * size + within).flatten()[: run.end]
            chunks.append(Chunk(first_row=num_decodes + first_rows[i], num_rows=run.num_tokens, context_slots=context))
        tables = CardTables(
            num_parts=num_splits(
                max(1, num_decodes), max((plane.num_heads for plane in self._cache.layout.planes[:1]), default=1), self._max_context
            ),
            chunk_blocks_CM=blocks_RM[num_decodes:],
            first_rows_C=first_C,
            num_rows_C=rows_C,
            num_past_C=past_C,
            max_rows=max((run.num_tokens for run in runs[num_decodes:]), default=0),
        )
        batch = AttentionBatch(
            positions_T=positions_T,
            slots_T=slots_T,
            block_size_tokens=size,
            decode_blocks_BM=blocks_RM[:num_decodes] if num_decodes else None,
            decode_lens_B=lens_B if num_decodes else None,
            chunks=chunks,
            states=self._states(runs),
            card=tables,
        )
        return ids_T, batch


def _tables(decodes: Sequence[Run], width: int) -> torch.Tensor:
    """int32 [B, width]; a request whose drafts follow its row one by one is written out once."""
    firsts = [i for i, run in enumerate(decodes) if i == 0 or run.block_ids is not decodes[i - 1].block_ids]
    blocks = torch.tensor([_padded(decodes[i].block_ids, width) for i in firsts], dtype=torch.int32)
    if len(firsts) == len(decodes):
        return blocks
    ends = [*firsts[1:], len(decodes)]
    owners = [number for number, (start, end) in enumerate(zip(firsts, ends, strict=True)) for _ in range(start, end)]
    # Not repeat_interleave: it wakes PyTorch's own threads however little there is to do, which cost 3 ms and the kernels' theirs.
    return blocks.index_select(0, torch.tensor(owners))


def _padded(block_ids: Sequence[int], width: int) -> list[int]:
    ids = list(block_ids[:width])
    return ids + [0] * (width - len(ids))
