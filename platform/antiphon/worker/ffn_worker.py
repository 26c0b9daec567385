"""The FFN worker: computes what has arrived for a layer, from all attention peers together, and forgets it (hot).

Stateless between messages: a worker that dies costs its peers nothing but sending the rows again.
Legend: R rows, D hidden, K expert ids per row. Must not know: requests, tokens, KV.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from antiphon.connectors.afd.ffn_side import FFNSide, FFNWork
from antiphon.core.errors import InvalidInput
from antiphon.models.decoder import FFNHalves
from antiphon.models.prefetch import WeightPrefetch
from antiphon.telemetry.step_trace import Mark, StepTrace
from antiphon.transport.base import Link
from antiphon.worker.batching import Batching
from antiphon.worker.cards.ffn_graphs import FFNGraphs, Rows

_IDLE_WAIT_S = 0.5
# So many messages in a row that could not be computed, and the worker is to blame: its supervisor starts a new one.
_MAX_FAULTS = 8

logger = logging.getLogger(__name__)


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
    num_faults: int = 0  # messages whose rows could not be computed, and were answered with NaN


class FFNWorker:
    """Owns one shard of every layer's FFN. Belongs to one loop."""

    def __init__(self, halves: FFNHalves, side: FFNSide, *, max_batch_wait_s: float = 0.0, graphs: FFNGraphs | None = None) -> None:
        """``max_batch_wait_s``: rows are held for those of other peers at most this long; 0 = never. ``graphs``: batches are
        replayed from it, where it has room for them.
        """
        self.graphs = graphs
        self.halves = halves
        self.side = side
        self.stats = FFNStats()
        self.wanted_trace: StepTrace | None = None  # any thread may set it
        self.trace: StepTrace | None = None  # the one of this batch
        self.placement = 0  # number of the placement that was settled last: experts of older ones may be gone
        self._batching: Batching[Link] = Batching(max_batch_wait_s)
        self._held: list[FFNWork] = []  # not answered yet
        self._num_changes = 0  # of the side's links, as last seen
        self._num_faults = 0  # messages in a row that could not be computed
        self._prefetch = WeightPrefetch(halves.first_weights)
        self._last = (0, 0)  # layer and ubatch answered last
        self._follows: dict[tuple[int, int], int] = {}  # the layer that came next, the last time

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Answer peers until ``stopped`` says so, which is asked at least twice a second."""
        with torch.inference_mode():
            while not stopped():
                start_s = time.perf_counter()
                if not self._take():
                    self.side.rest()
                    self.side.wait(_IDLE_WAIT_S)
                    continue
                due_s = self._answer_due()
                now_s = time.perf_counter()
                self.stats.busy_s += now_s - start_s
                if due_s > now_s:
                    self.side.wait(due_s - now_s)
                elif not self._held:
                    self._prefetch.warm(self._follows.get(self._last, 0), self.side.pending)

    def pump(self) -> bool:
        """Answer everything that has arrived, one batch per layer, and hold nothing; False when nothing had."""
        start_s = time.perf_counter()
        if not self._take():
            return False
        works, self._held = self._held, []
        for layer, batch in _by_layer(works).items():
            self._answer(layer, batch)
        self.stats.busy_s += time.perf_counter() - start_s
        return True

    def _take(self) -> bool:
        """Take what has arrived; False when nothing is to be answered."""
        works = self.side.poll()
        if self.side.num_changes != self._num_changes:
            self._num_changes = self.side.num_changes
            self._held = [work for work in self._held if self.side.serves(work.link)]
            self._batching.keep(self.side.serves)
        for work in works:
            if work.header.spare < self.placement:
                self.stats.num_stale_messages += 1
            if self._gathers:
                self._batching.arrived(work.link, work.header.ubatch, work.header.layer, work.arrived_s)
        self._held += works
        return bool(self._held)

    @property
    def _gathers(self) -> bool:
        return self._batching.max_wait_s > 0 and self.side.num_peers > 1

    def _answer_due(self) -> float:
        """Answer what is not worth holding; when (``time.perf_counter``) the first of the rest is, or 0."""
        now_s, due_s = time.perf_counter(), 0.0
        works, self._held = self._held, []
        if self._gathers:
            ready = []
            for work in works:
                until_s = self._batching.hold_until(work.link, work.header.ubatch, now_s)
                if until_s > now_s:
                    self._held.append(work)
                    due_s = until_s if due_s == 0.0 else min(due_s, until_s)
                else:
                    ready.append(work)
            works = ready
        for layer, batch in _by_layer(works).items():
            self._answer(layer, batch)
        return due_s

    def _answer(self, layer: int, batch: list[FFNWork]) -> None:
        self.trace = self.wanted_trace
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
        except Exception as error:  # noqa: BLE001 - answered, or raised by _fault
            if len(batch) > 1:
                for work in batch:
                    self._answer(layer, [work])
                return
            out_RD = self._fault(layer, batch[0], error)
        else:
            self._num_faults = 0
        compute_s = time.perf_counter() - start_s
        self._follows[self._last] = layer
        self._last = (layer, batch[-1].header.ubatch)
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
            part_RD = out_RD if len(batch) == 1 else out_RD[at:end]
            self.side.reply(work, part_RD, compute_us=int(compute_s * 1e6), wait_us=int(wait_s * 1e6), batch_rows=num_rows)
            self._batching.answered(work.link, work.header.ubatch, time.perf_counter(), compute_s)
            at = end
        if self.trace is not None:
            self._trace(layer, batch, start_s, compute_s, num_rows)

    def _fault(self, layer: int, work: FFNWork, error: Exception) -> torch.Tensor:
        """What rows that could not be computed are answered with: NaN, by which their requests end, and nobody else's.

        Raises:
            Exception: the fault, once so many messages in a row had one that this worker is to blame.
        """
        self.stats.num_faults += 1
        self._num_faults += 1
        if self._num_faults >= _MAX_FAULTS:
            raise error
        logger.error("%d rows of %s can't be computed in layer %d", work.header.rows, work.link.peer, layer, exc_info=error)
        return torch.full((work.header.rows, work.rows_RD.shape[1]), float("nan"))

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
        if self.graphs is not None:
            parts = [Rows(rows_RD=work.rows_RD, ids_RK=work.ids_RK, weights_RK=work.weights_RK) for work in batch]
            if (out_RD := self.graphs.compute(layer, parts)) is not None:
                return out_RD
        first = batch[0]
        rows_RD = first.rows_RD if len(batch) == 1 else torch.cat([work.rows_RD for work in batch])
        if first.ids_RK is None:
            return self.halves.compute(layer, rows_RD)
        if len(batch) == 1:
            return self.halves.compute(layer, rows_RD, first.ids_RK, first.weights_RK)
        ids_RK = torch.cat([work.ids_RK for work in batch if work.ids_RK is not None])
        weights_RK = torch.cat([work.weights_RK for work in batch if work.weights_RK is not None])
        return self.halves.compute(layer, rows_RD, ids_RK, weights_RK)


def _by_layer(works: list[FFNWork]) -> dict[int, list[FFNWork]]:
    by_layer: dict[int, list[FFNWork]] = {}
    for work in works:
        by_layer.setdefault(work.header.layer, []).append(work)
    return by_layer
