"""A worker of FFN weights, and whoever sends them rows (control speed around its loop).

Must not know: leases, signals, rebalancing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from antiphon.apps.process import data_links
from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.peers.keeper import PeerKeeper, PeerWish
from antiphon.apps.process.wiring.build import AttentionPart, build_ffn
from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.apps.process.wiring.sizes import afd_layout
from antiphon.core.errors import LayoutMismatch
from antiphon.core.worker_info import WorkerLoad
from antiphon.rpc.engine.server import EngineServicer
from antiphon.telemetry.stages import StageWindow, ffn_figures
from antiphon.transport.base import Hello, Listener
from antiphon.worker.ffn_worker import FFNWorker

_MAX_UBATCHES = 8  # that a peer may keep in flight


class FFNRole:
    """FFN weights, and whoever sends them rows."""

    def __init__(self, config: WorkerConfig, facts: ModelFacts) -> None:
        self._config = config
        self._facts = facts
        self._started_s = time.monotonic()
        self._window = StageWindow(ffn_figures)
        self._worker = build_ffn(facts, config.shard, config.epoch)
        self.part: AttentionPart | None = None
        self.ffn: FFNWorker | None = self._worker

    @property
    def worker(self) -> FFNWorker:
        """What computes."""
        return self._worker

    @property
    def resident_weight_bytes(self) -> int:
        """Weights of its shard."""
        return sum(self._worker.halves.resident_bytes.values())

    @property
    def stalled(self) -> str:
        """It waits for nobody."""
        return ""

    @property
    def lacks_peers(self) -> bool:
        """It needs nobody."""
        return False

    def listen(self) -> Listener:
        """Attention workers reach it here."""
        listener = data_links.listen(self._config.spec.transport.activations, self._config.host, self._answer)
        self._worker.side.add_listener(listener)
        return listener

    def _answer(self, hello: Hello) -> Hello:
        """The peer chooses how many ubatches it keeps in flight; everything else must be equal."""
        config, streams = self._config, self._facts.config.num_streams
        ubatches = (hello.layout.num_slots - 1) // streams
        if not 1 <= ubatches <= _MAX_UBATCHES:
            expected = f"{streams + 1} to {_MAX_UBATCHES * streams + 1}"
            raise LayoutMismatch(hello.worker_id, [f"num_slots {hello.layout.num_slots}, expected {expected}"])
        layout = afd_layout(self._facts, config.spec, config.shard, attention_end=False, ubatches=ubatches)
        return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

    def wishes(self) -> list[PeerWish]:
        """It looks for nobody."""
        return []

    def await_peers(self, peers: PeerKeeper, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> None:
        """It needs nobody."""

    def attach(self, servicer: EngineServicer | None) -> None:
        """It has no outputs."""

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Answer rows until stopped."""
        self._worker.serve(is_stopped)

    def stop(self) -> None:
        """The loop looks by itself."""

    def load(self) -> WorkerLoad:
        """Rows, batches and stages."""
        stats, halves, side = self._worker.stats, self._worker.halves, self._worker.side
        sums = {
            "sum_compute_s": stats.compute_s,
            "sum_wait_s": stats.wait_s,
            "sum_busy_s": stats.busy_s,
            "sum_uptime_s": time.monotonic() - self._started_s,
            "num_rows": float(stats.num_rows),
            "num_batches": float(stats.num_batches),
            "num_messages": float(stats.num_messages),
        }
        return WorkerLoad(
            num_peers=side.num_peers,
            num_ffn_rows=stats.num_rows,
            num_ffn_batches=stats.num_batches,
            resident_weight_bytes=self.resident_weight_bytes,
            gauges={
                "num_free_slots": float(side.num_free_slots),
                "num_stale_messages": float(stats.num_stale_messages),
                "num_late_experts": float(sum(bank.num_late_loads for bank in halves.banks.values())),
                **sums,
                **self._window.look(sums),
            },
        )

    def close(self) -> None:
        """Close listeners and links; idempotent."""
        self._worker.side.close()
