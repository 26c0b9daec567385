"""A worker with an engine: monolith, prefill, decode or attention (control speed around the engine's loop).

Must not know: leases, signals, rebalancing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from antiphon.apps.process import data_links
from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.engine_host import EngineHost
from antiphon.apps.process.peers.keeper import PeerKeeper, PeerWish
from antiphon.apps.process.peers.watch import Creditor
from antiphon.apps.process.wiring.build import AttentionPart, build_attention
from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.apps.process.wiring.sizes import afd_layout, kv_link_layout, num_ubatches
from antiphon.core.errors import InternalError, LayoutMismatch, Unavailable
from antiphon.core.ids import Role
from antiphon.core.request import RequestOutput
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.rpc.engine.server import EngineServicer
from antiphon.telemetry import Telemetry
from antiphon.transport.base import Hello, Link, Listener
from antiphon.worker.model_runner import AttentionWorker

_PEERS_TIMEOUT_S = 90.0
_PREFILL_TIMEOUT_S = 10.0
_READY_POLL_S = 0.02
_STALLED_S = 2.0
_LACKING_SHARE = 0.7  # of peerTimeoutS: the gateway knows before the first request ends, and places none here again


class AttentionRole:
    """An engine with its loop."""

    def __init__(self, config: WorkerConfig, facts: ModelFacts, telemetry: Telemetry) -> None:
        self._config = config
        self._facts = facts
        self._servicer: EngineServicer | None = None
        self._engine = build_attention(
            facts, config.spec, config.role, config.worker_id, config.epoch, self._take, time.monotonic, index=config.index
        )
        self._host = EngineHost(self._engine, telemetry, config.role.value)
        self.part: AttentionPart | None = self._engine
        self.ffn = self._engine.ffn

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        self._host.take(outputs)

    @property
    def worker(self) -> AttentionWorker:
        """What computes."""
        return self._engine.worker

    @property
    def resident_weight_bytes(self) -> int:
        """Weights that it holds, those of an inline FFN half included."""
        return sum(self._engine.resident_bytes.values())

    @property
    def stalled(self) -> str:
        """FFN workers that have not answered for long."""
        side = self._engine.worker.afd
        missing_s, waits_s = side.missing_s, side.waits_s
        if missing_s > _STALLED_S:
            last = f"; the last: {side.losses[-1]}" if side.losses else ""
            return f"no FFN worker holds a shard, for {missing_s:.0f} s{last}"
        return f"waiting for FFN workers to answer, for {waits_s:.0f} s" if waits_s > _STALLED_S else ""

    @property
    def lacks_peers(self) -> bool:
        """A shard has been without a worker for so long that requests are about to end for it: no more should come."""
        return self._engine.worker.afd.missing_s > _LACKING_SHARE * self._config.spec.transport.peer_timeout_s

    def listen(self) -> Listener | None:
        """A prefill worker is reached by those that decode."""
        side, config = self._engine.prefill_side, self._config
        if side is None:
            return None
        layout = kv_link_layout(self._facts, decode_end=False)
        listener = data_links.listen(
            config.spec.transport.kv,
            config.host,
            lambda _hello: Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout),
        )
        side.add_listener(listener)
        return listener

    def wishes(self) -> list[PeerWish]:
        """FFN workers of every shard, where layers are halved; prefill workers, where prompts are computed elsewhere."""
        config, side, decode_side = self._config, self._engine.worker.afd, self._engine.decode_side
        wishes: list[PeerWish] = []
        if config.role is Role.ATTENTION:

            def afd_hello(info: WorkerInfo) -> Hello:
                ubatches = num_ubatches(config.spec, config.role)
                layout = afd_layout(self._facts, config.spec, info.shard, attention_end=True, ubatches=ubatches)
                return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

            def add_ffn(info: WorkerInfo, link: Link) -> None:
                side.add_link(info.shard.index, link)

            wishes.append(
                PeerWish(
                    role=Role.FFN,
                    hello=afd_hello,
                    linked=side.peers,
                    add_link=add_ffn,
                    creditor=Creditor(owing=side.owing, lose=side.lose),
                )
            )
        if decode_side is not None:

            def kv_hello(_info: WorkerInfo) -> Hello:
                layout = kv_link_layout(self._facts, decode_end=True)
                return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

            def add_prefill(_info: WorkerInfo, link: Link) -> None:
                decode_side.add_link(link)
                self._host.wakeup.ring()

            wishes.append(
                PeerWish(
                    role=Role.PREFILL,
                    hello=kv_hello,
                    linked=decode_side.peers,
                    add_link=add_prefill,
                    creditor=Creditor(owing=decode_side.owing, lose=decode_side.lose),
                )
            )
        return wishes

    def await_peers(self, peers: PeerKeeper, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> None:
        """Wait for FFN workers, without whom nothing can be computed; and a little for a prefill worker, who is only better.

        Raises:
            LayoutMismatch: a worker of this revision is wired differently.
            Unavailable: FFN workers did not come.
        """
        side, decode_side = self._engine.worker.afd, self._engine.decode_side
        say("waiting for FFN workers")
        deadline = time.monotonic() + _PEERS_TIMEOUT_S
        while not side.complete and not is_stopped():
            peers.check()
            if isinstance(peers.last_refusal, LayoutMismatch):
                raise peers.last_refusal
            if time.monotonic() > deadline:
                raise Unavailable(f"FFN workers for all shards did not come within {_PEERS_TIMEOUT_S:g} s")
            time.sleep(_READY_POLL_S)
        say("waiting for a prefill worker")
        deadline = time.monotonic() + _PREFILL_TIMEOUT_S
        while decode_side is not None and not decode_side.peers() and not is_stopped() and time.monotonic() < deadline:
            peers.check()
            time.sleep(_READY_POLL_S)

    def attach(self, servicer: EngineServicer | None) -> None:
        """Outputs go to ``servicer``."""
        self._servicer = self._host.servicer = servicer

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Step until stopped, then drain."""
        try:
            self._host.run(self._config.drain_s)
        except BaseException:
            if self._servicer is not None:
                self._servicer.fail(InternalError(f"worker {self._config.worker_id} failed"))
            raise

    def stop(self) -> None:
        """End ``run`` after the current step; safe from any thread and signal handler."""
        self._host.stop()

    def load(self) -> WorkerLoad:
        """Queues, blocks and stages of the engine."""
        return self._host.load()

    def close(self) -> None:
        """Close links; idempotent."""
        self._engine.close()
