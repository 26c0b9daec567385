"""The FFN worker: computes what has arrived for a layer, from all attention peers together, and forgets it (hot).

Stateless between messages: a worker that dies costs its peers nothing but sending the rows again.
Legend: R rows, D hidden, K expert ids per row. Must not know: requests, tokens, KV.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from antiphon.connectors.ffn_side import FFNSide, FFNWork
from antiphon.core.errors import InvalidInput
from antiphon.models.decoder import FFNHalves
from antiphon.telemetry.step_trace import Mark, StepTrace

_IDLE_WAIT_S = 0.5


@dataclass(slots=True, kw_only=True)
class FFNStats:
    """Since start."""

    num_rows: int = 0
    num_batches: int = 0
    num_messages: int = 0  # rows of one peer each
    compute_s: float = 0.0
    wait_s: float = 0.0  # sum over messages, from arrival to the start of their batch
    busy_s: float = 0.0  # computing, and taking and answering messages; the rest is waiting for peers
    num_stale_messages: int = 0  # routed by a placement whose experts had been let go already; computed all the same


class FFNWorker:
    """Owns one shard of every layer's FFN. Belongs to one loop."""

    def __init__(self, halves: FFNHalves, side: FFNSide) -> None:
        self.halves = halves
        self.side = side
        self.stats = FFNStats()
        self.trace: StepTrace | None = None  # set before the loop by who wants one
        self.placement = 0  # number of the placement that was settled last: experts of older ones may be gone

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Answer peers until ``stopped`` says so, which is asked at least twice a second."""
        with torch.inference_mode():
            while not stopped():
                if not self.pump():
                    self.side.wait(_IDLE_WAIT_S)

    def pump(self) -> bool:
        """Answer everything that has arrived, one batch per layer; False when nothing had."""
        start_s = time.perf_counter()
        works = self.side.poll()
        if not works:
            return False
        by_layer: dict[int, list[FFNWork]] = {}
        for work in works:
            if work.header.spare < self.placement:
                self.stats.num_stale_messages += 1
            by_layer.setdefault(work.header.layer, []).append(work)
        for layer, batch in by_layer.items():
            self._answer(layer, batch)
        self.stats.busy_s += time.perf_counter() - start_s
        return True

    def _answer(self, layer: int, batch: list[FFNWork]) -> None:
        start_s = time.perf_counter()
        try:
            out_RD = self._compute(layer, batch)
        except InvalidInput as error:
            if len(batch) == 1:
                self.side.refuse(batch[0], str(error))
                return
            for work in batch:  # find the peer whose rows are wrong; the others get their answer
                self._answer(layer, [work])
            return
        compute_s = time.perf_counter() - start_s
        num_rows = out_RD.shape[0]
        self.stats.num_rows += num_rows
        self.stats.num_batches += 1
        self.stats.compute_s += compute_s
        at = 0
        for work in batch:
            end = at + work.header.rows
            wait_s = start_s - work.arrived_s
            self.stats.wait_s += wait_s
            self.stats.num_messages += 1
            self.side.reply(work, out_RD[at:end], compute_us=int(compute_s * 1e6), wait_us=int(wait_s * 1e6), batch_rows=num_rows)
            at = end
        if self.trace is not None:
            self._trace(layer, batch, start_s, compute_s, num_rows)

    def _trace(self, layer: int, batch: list[FFNWork], start_s: float, compute_s: float, num_rows: int) -> None:
        assert self.trace is not None
        for work in batch:
            header = work.header
            self.trace.add(
                Mark.ROWS,
                work.arrived_s,
                start_s + compute_s,
                header.step,
                layer,
                header.ubatch,
                header.rows,
                work.link.peer,
            )
        self.trace.add(Mark.COMPUTE, start_s, time.perf_counter(), 0, layer, 0, num_rows)

    def _compute(self, layer: int, batch: list[FFNWork]) -> torch.Tensor:
        first = batch[0]
        rows_RD = first.rows_RD if len(batch) == 1 else torch.cat([work.rows_RD for work in batch])
        if rows_RD.dtype is not self.halves.dtype:
            rows_RD = rows_RD.to(self.halves.dtype)
        if first.ids_RK is None:
            return self.halves.compute(layer, rows_RD)
        ids_RK = torch.cat([work.ids_RK for work in batch if work.ids_RK is not None])
        weights_RK = torch.cat([work.weights_RK for work in batch if work.weights_RK is not None])
        return self.halves.compute(layer, rows_RD, ids_RK, weights_RK)
