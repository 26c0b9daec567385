"""Whole decode steps of tiny models for the tests of this folder: both halves, on whatever counts as a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from antiphon.core.ids import FFNShard
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.cache_layout import kv_layout
from antiphon.models.decoder import AttentionHalves, FFNHalves, StepState
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.testing import write_tiny_llama, write_tiny_moe
from antiphon.worker.batch_builder import BatchBuilder, Run

WRITERS: dict[str, Callable[[Path], object]] = {"dense": write_tiny_llama, "moe": write_tiny_moe}
NUM_BLOCKS, BLOCK = 16, 4


@dataclass(slots=True, kw_only=True)
class Model:
    """Both halves of a tiny model, and room for its KV."""

    halves: AttentionHalves
    ffn: FFNHalves
    cache: KVCache
    builder: BatchBuilder

    @classmethod
    def write(cls, kind: str, folder: Path) -> Model:
        """Write a checkpoint and read both halves of it."""
        WRITERS[kind](folder)
        return cls.read(folder, "cpu")

    @classmethod
    def read(cls, folder: Path, device: str) -> Model:
        """Read both halves of a checkpoint."""
        checkpoint = Checkpoint.open(folder)
        config, where = describe(checkpoint.config), torch.device(device)
        halves = AttentionHalves(config, checkpoint, torch.float32, where, 64)
        cache = KVCache(kv_layout(config, torch.float32, BLOCK), NUM_BLOCKS, where)
        return cls(
            halves=halves,
            ffn=FFNHalves(config, checkpoint, torch.float32, where, FFNShard()),
            cache=cache,
            builder=BatchBuilder(cache, where, 64, with_slots=halves.reads_context_slots),
        )

    def layers(self, state: StepState) -> StepState:
        """Every layer's two halves."""
        for layer in range(self.halves.config.num_layers):
            results = {}
            for out in self.halves.attend(layer, state, self.cache):
                routing = out.routing
                ids, weights = (None, None) if routing is None else (routing.ids_TK, routing.weights_TK)
                results[out.stream] = self.ffn.compute(out.ffn, out.rows_TD, ids, weights)
            self.halves.combine(layer, state, [results[stream] for stream in self.halves.streams_due(layer)])
        return state

    def step(self, runs: Sequence[Run]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token of every row, and its logit."""
        state = self.layers(self.halves.begin(*self.builder.build(runs)))
        return self.halves.greedy(state.x_TD)


def decodes(*lengths: int) -> list[Run]:
    """One decode per context length; blocks do not overlap."""
    return [
        Run(token_ids=[(7 * i + t) % 90 for t in range(n)], block_ids=range(3 * i, 3 * i + 3), first_token=n - 1, num_tokens=1)
        for i, n in enumerate(lengths)
    ]
