"""A small decoder that drafts: both halves of its layers in this process, one after the other, over a cache of its own (hot).

No exchange takes part: a draft that cost a round trip in every layer would cost what it is to save.
Legend: T rows, D hidden, R rows at which something is drawn. Must not know: requests, who asks for drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.worker.batch_builder import BatchBuilder, Run
from antiphon.worker.sampler import SamplingState, numbers_only, sample

Entry = Callable[[torch.Tensor], torch.Tensor]  # what the first layer gets [T, D], from embeddings [T, D]


class LocalDecoder:
    """Owned by one drafter."""

    def __init__(self, halves: AttentionHalves, ffns: FFNHalves, cache: KVCache) -> None:
        """``ffns``: whole, not a shard of them."""
        self.halves = halves
        self.cache = cache
        self._ffns = ffns
        self._builder = BatchBuilder(cache, halves.device, halves.max_model_len, with_slots=halves.reads_context_slots)

    def run(self, runs: Sequence[Run], entry: Entry | None = None) -> torch.Tensor:
        """The residual stream [T, D] behind the last layer; runs of one row come first. Their K and V are in the cache then."""
        halves = self.halves
        state = halves.begin(*self._builder.build(runs))
        if entry is not None:
            state.x_TD = entry(state.x_TD)
        back: dict[int, torch.Tensor] = {}  # by stream
        for layer in range(halves.config.num_layers):
            for leaving in halves.attend(layer, state, self.cache):
                routing = leaving.routing
                ids_TK, weights_TK = (None, None) if routing is None else (routing.ids_TK, routing.weights_TK)
                back[leaving.stream] = self._ffns.compute(leaving.ffn, leaving.rows_TD, ids_TK, weights_TK)
            halves.combine(layer, state, [back.pop(stream) for stream in halves.streams_due(layer)])
        state.settle()
        return state.x_TD

    def draw(self, x_RD: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[int | None]:
        """A token a row, as the sampler would draw it at these positions; None where the row is none of numbers."""
        if all(state.needs_best_only for state in states):
            return numbers_only(*self.halves.greedy(x_RD))
        return sample(self.halves.logits(x_RD), states, positions)
