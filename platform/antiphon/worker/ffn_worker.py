"""The FFN worker: computes what has arrived for a layer, from all attention peers together, and forgets it (hot).

Stateless between messages: a worker that dies costs its peers nothing but sending the rows again. Legend: T rows, D hidden.
Must not know: requests, tokens, KV.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from antiphon.connectors.afd import FFNSide, FFNWork
from antiphon.models.decoder import FFNHalves


@dataclass(slots=True, kw_only=True)
class FFNStats:
    """Since start."""

    num_rows: int = 0
    num_batches: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0  # sum over messages, from arrival to the start of their batch


class FFNWorker:
    """Owns one shard of every layer's FFN. Belongs to one loop."""

    def __init__(self, halves: FFNHalves, side: FFNSide) -> None:
        self.halves = halves
        self.side = side
        self.stats = FFNStats()

    def pump(self) -> bool:
        """Answer everything that has arrived, one batch per layer; False when nothing had."""
        works = self.side.poll()
        if not works:
            return False
        by_layer: dict[int, list[FFNWork]] = {}
        for work in works:
            by_layer.setdefault(work.header.layer, []).append(work)
        for layer, batch in by_layer.items():
            self._compute(layer, batch)
        return True

    def _compute(self, layer: int, batch: list[FFNWork]) -> None:
        start_s = time.perf_counter()
        rows_TD = batch[0].rows_TD if len(batch) == 1 else torch.cat([work.rows_TD for work in batch])
        if rows_TD.dtype is not self.halves.dtype:
            rows_TD = rows_TD.to(self.halves.dtype)
        out_TD = self.halves.compute(layer, rows_TD)
        compute_s = time.perf_counter() - start_s
        num_rows = rows_TD.shape[0]
        self.stats.num_rows += num_rows
        self.stats.num_batches += 1
        self.stats.compute_s += compute_s
        at = 0
        for work in batch:
            end = at + work.header.rows
            wait_s = start_s - work.arrived_s
            self.stats.wait_s += wait_s
            self.side.reply(work, out_TD[at:end], compute_us=int(compute_s * 1e6), wait_us=int(wait_s * 1e6), batch_rows=num_rows)
            at = end
