"""A step as large as any that a worker will compute, done once to see what memory it takes (control speed).

All rows read and write the same one block, so that nothing of the cache's real size is needed: what comes out means nothing.
Must not know: how memory is counted, documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.core.kv import KVLayout
from antiphon.core.step import StateStep
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.states import StateRun
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.worker.batch_builder import BatchBuilder, Run


class LargestSteps:
    """Steps of one worker's halves, on a cache of one block. ``ffn``: None where FFN halves are elsewhere."""

    def __init__(self, halves: AttentionHalves, ffn: FFNHalves | None, layout: KVLayout) -> None:
        self._halves, self._ffn = halves, ffn
        self._cache = KVCache(layout, 1, halves.device, 1 if layout.has_state else 0)
        self._builder = BatchBuilder(self._cache, halves.device, halves.max_model_len, with_slots=halves.reads_context_slots)
        self._blocks = [0] * layout.num_blocks_for(halves.max_model_len)
        self._ids = [0] * halves.max_model_len

    def prompts(self, num_rows: int, num_sampled: int) -> None:
        """``num_rows`` rows of prompts, at the end of the longest context, and tokens drawn at ``num_sampled`` of them."""
        longest = self._halves.max_model_len
        sizes = [min(longest, num_rows - start) for start in range(0, num_rows, longest)]
        self._compute([self._run(size) for size in sizes], num_sampled)

    def decodes(self, num_rows: int) -> None:
        """One token of each of ``num_rows`` requests, with the longest context."""
        self._compute([self._run(1)] * num_rows, num_rows)

    def _run(self, num_tokens: int) -> Run:
        first = self._halves.max_model_len - num_tokens
        state = None
        if self._cache.layout.has_state:
            state = StateRun.of(StateStep(read=None, write=0), first, first, num_tokens, self._cache.blank_state)
        return Run(token_ids=self._ids, block_ids=self._blocks, first_token=first, num_tokens=num_tokens, state=state)

    def _compute(self, runs: Sequence[Run], num_sampled: int) -> None:
        halves = self._halves
        with torch.inference_mode():
            state = halves.begin(*self._builder.build(runs))
            results: dict[int, torch.Tensor] = {}
            for layer in range(halves.config.num_layers):
                for out in halves.attend(layer, state, self._cache):
                    ids, weights = (None, None) if out.routing is None else (out.routing.ids_TK, out.routing.weights_TK)
                    results[out.stream] = (
                        torch.zeros_like(out.rows_TD)
                        if self._ffn is None
                        else self._ffn.compute(out.ffn, out.rows_TD, ids, weights)
                    )
                halves.combine(layer, state, [results[stream] for stream in halves.streams_due(layer)])
            halves.logits(state.x_TD[:num_sampled]).max(dim=-1)
