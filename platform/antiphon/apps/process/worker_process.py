"""Everything one data-plane process owns, for any role (control speed around a hot loop).

Threads: the worker loop (this one, pinned to the worker's cores, with its compute threads), rpc, lease, peers. The others start
before the pinning, so that they do not inherit it. Must not know: Ray.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch

from antiphon.apps.process import data_links
from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.engine_host import EngineHost, RpcThread
from antiphon.apps.process.events import EventWriter
from antiphon.apps.process.expert_host import ExpertHost
from antiphon.apps.process.load_report import load_reported
from antiphon.apps.process.peers import PeerKeeper, PeerWish
from antiphon.apps.process.pinning import pin_each, unpinned
from antiphon.apps.process.rebalancer import ModelShape, Rebalancer, adopt_newest
from antiphon.apps.process.wiring.build import AttentionPart, build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import ModelFacts, resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, ffn_parallelism, kv_link_layout, num_ubatches
from antiphon.core.device import memory_share
from antiphon.core.errors import InternalError, LayoutMismatch, Unavailable
from antiphon.core.ids import Endpoint, Role
from antiphon.core.request import RequestOutput
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.device.device import Device, open_device
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper
from antiphon.directory.memory import open_directory
from antiphon.telemetry import configure_logging, setup, step_trace
from antiphon.telemetry.stages import StageWindow, ffn_figures
from antiphon.transport.base import Answer, Hello, Link, Listener
from antiphon.transport.waiting import give_way
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.tracing import StepRecorder

_PEERS_TIMEOUT_S = 90.0
_PREFILL_TIMEOUT_S = 10.0
_READY_POLL_S = 0.02
_STALLED_S = 2.0

# How long another thread may keep the GIL that the loop wants back, after every operator and every wait. Python's own 5 ms would be
# a stall of several layers whenever the rpc thread or the lease has something to do.
_SWITCH_INTERVAL_S = 200e-6


def device_of(config: WorkerConfig) -> Device:
    """Open the device that the worker's pool asks for. Raises InvalidInput, which names the field."""
    pool = config.pool_spec
    field = f"spec.pools[{config.spec.pools.index(pool)}].resources.gpu"
    return open_device(pool.worker_device, memory_share(pool), field)


class WorkerProcess:
    """One worker. Built in its process's main thread, which then calls ``run``; ``stop`` is safe from signal handlers."""

    def __init__(self, config: WorkerConfig, events: EventWriter) -> None:
        """Build the worker up to its listeners.

        Raises:
            AntiphonError: checkpoint, document or addresses can't be used.
        """
        self._config = config
        self._events = events
        self._stop = threading.Event()
        self._started_s = time.monotonic()
        self._ready = False
        self._message = "starting"
        self._closers: list[Callable[[], None]] = []
        configure_logging(config.log.level, json=config.log.format == "json", worker=config.worker_id, generation=config.epoch)
        self._telemetry = setup(
            f"antiphon-{config.role.value}",
            attributes={"service.instance.id": config.worker_id, "antiphon.deployment": config.deployment},
        )
        self._closers.append(self._telemetry.close)
        torch.set_num_threads(config.threads)
        pin_each(config.cores, share=config.shares_cores)
        if config.shares_cores:
            give_way()
        with events.timed("weights"):
            self._facts: ModelFacts = resolve_model(config.spec, config.checkpoint, config.revision, device_of(config))
            self._ffn: FFNWorker | None = None
            self._part: AttentionPart | None = None
            self._host: EngineHost | None = None
            with load_reported(self._facts, config, events):
                self._build()
        self._window = StageWindow(ffn_figures)
        self._trace_steps()
        self._lease: LeaseKeeper | None = None
        self._experts = self._expert_host()
        with events.timed("listeners"), unpinned():
            enforcer = None if self._part is None else self._part.worker.enforcer
            self._rpc = RpcThread(
                config.host,
                self._part.engine if self._part is not None and config.role.generates else None,
                prepare=None if enforcer is None else enforcer.prepare,
                experts=self._experts,
                steps=self._step_recorder(),
            )
            self._closers.append(self._rpc.close)
            if self._host is not None:
                self._host.servicer = self._rpc.engine
            self._listener = self._listen()
            self._directory = BlockingDirectory(open_directory(config.directory))
        self._closers.append(self._directory.close)

    def _build(self) -> None:
        config = self._config
        if config.role is Role.FFN:
            self._ffn = build_ffn(self._facts, config.shard, config.epoch)
            return
        self._part = build_attention(
            self._facts,
            config.spec,
            config.role,
            config.worker_id,
            config.epoch,
            self._take,
            time.monotonic,
            index=config.index,
        )
        self._host = EngineHost(self._part, self._telemetry, config.role.value)

    def run(self, started_s: float) -> None:
        """Register, wait for peers, become ready, and serve until ``stop``.

        Raises:
            AntiphonError: what ended the worker.
        """
        config = self._config
        with unpinned():
            if self._experts is not None and config.role in (Role.FFN, Role.ATTENTION):
                adopt_newest(self._experts, config.role, self._directory, config.deployment, config.revision)
            lease = self._lease = LeaseKeeper(self._directory, self._describe, config.spec.directory.lease_s)
            peers = PeerKeeper(self._directory, config.deployment, config.revision, self._wishes(), data_links.connect)
        self._closers += [lease.close, peers.close]
        with lease:
            with self._events.timed("peers"):
                self._await_peers(peers)
            if self._stop.is_set():
                return
            gc.collect()
            gc.freeze()  # what imports and weights made stays: no collection while serving need look at it
            self._ready, self._message = True, ""
            lease.renew_soon()
            self._balance()
            self._events.stage("total", time.monotonic() - started_s)
            self._events.ready(**self._ready_facts())
            threading.Thread(target=self._watch, args=(lease, peers), name="watch", daemon=True).start()
            self._loop()
            self._ready, self._message = False, "stopped"
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Drain and end ``run``."""
        self._stop.set()
        if self._host is not None:
            self._host.stop()

    def close(self) -> None:
        """Give everything back; idempotent."""
        if self._part is not None:
            self._part.close()
        if self._ffn is not None:
            self._ffn.side.close()
        while self._closers:
            self._closers.pop()()

    def _trace_steps(self) -> None:
        """Let the worker keep what its steps do, where its environment asks for that; it is written when the worker ends."""
        config, directory = self._config, step_trace.asked_for()
        worker = self._ffn if self._part is None else self._part.worker
        if directory is None or worker is None:
            return
        trace = worker.wanted_trace = step_trace.StepTrace()

        def leave() -> None:
            step_trace.save(trace.taken(worker=config.worker_id, role=config.role.value), directory, config.epoch)

        self._closers.append(leave)

    def _step_recorder(self) -> StepRecorder | None:
        worker = self._ffn if self._part is None else self._part.worker
        return None if worker is None else StepRecorder(worker, worker_id=self._config.worker_id, role=self._config.role.value)

    # ---- the loop ----------------------------------------------------------------------------------------------

    _failure: BaseException | None = None
    _rebalancer: Rebalancer | None = None

    def _loop(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        if self._host is not None:
            try:
                self._host.run(self._config.drain_s)
            except BaseException:
                if self._rpc.engine is not None:
                    self._rpc.engine.fail(InternalError(f"worker {self._config.worker_id} failed"))
                raise
            return
        assert self._ffn is not None
        self._ffn.serve(self._stop.is_set)

    def _watch(self, lease: LeaseKeeper, peers: PeerKeeper) -> None:
        """Stops the loop when a thread beside it has failed, or another process took this worker's place."""
        while not self._stop.wait(1.0):
            try:
                lease.check()
                peers.check()
                if self._rebalancer is not None:
                    self._rebalancer.check()
                if lease.superseded:
                    raise Unavailable(f"{self._config.worker_id} was replaced by a newer epoch")
            except BaseException as error:  # noqa: BLE001  # raised by run()
                self._failure = error
                self.stop()
                return

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        assert self._host is not None
        self._host.take(outputs)

    # ---- experts -----------------------------------------------------------------------------------------------

    def _expert_host(self) -> ExpertHost | None:
        config, facts, part = self._config, self._facts, self._part
        if not facts.config.num_experts:
            return None
        _, groups = ffn_parallelism(config.spec) if config.role in (Role.FFN, Role.ATTENTION) else (1, 1)

        def changed() -> None:
            if self._lease is not None:
                self._lease.renew_soon()

        return ExpertHost(
            config=facts.config,
            role=config.role,
            worker_id=config.worker_id,
            deployment=config.deployment,
            placement=facts.placement(groups),
            ffn=self._ffn if part is None else part.ffn,
            attention=None if part is None else part.worker,
            changed=changed,
        )

    def _balance(self) -> None:
        config, facts = self._config, self._facts
        tensor, groups = ffn_parallelism(config.spec)
        if self._experts is None or config.role is not Role.ATTENTION or groups == 1:
            return
        with unpinned():
            self._rebalancer = Rebalancer(
                self._experts,
                self._directory,
                deployment=config.deployment,
                revision=config.revision,
                worker_id=config.worker_id,
                shape=ModelShape(
                    config=facts.config, itemsize_bytes=1 if facts.int8 is not None else facts.dtype.itemsize, num_tensor=tensor
                ),
                spec=config.spec.experts.rebalance,
            )
        self._closers.append(self._rebalancer.close)

    # ---- peers -------------------------------------------------------------------------------------------------

    def _listen(self) -> Listener | None:
        config, spec = self._config, self._config.spec
        if self._ffn is not None:
            listener = data_links.listen(spec.transport.activations, config.host, self._answer_afd())
            self._ffn.side.add_listener(listener)
            return listener
        assert self._part is not None
        if self._part.prefill_side is not None:
            listener = data_links.listen(spec.transport.kv, config.host, self._answer_kv())
            self._part.prefill_side.add_listener(listener)
            return listener
        return None

    def _answer_afd(self) -> Answer:
        config, facts = self._config, self._facts

        def answer(hello: Hello) -> Hello:
            # The peer chooses how many ubatches it keeps in flight; everything else must be equal.
            streams = facts.config.num_streams
            ubatches = (hello.layout.num_slots - 1) // streams
            if not 1 <= ubatches <= 8:
                raise LayoutMismatch(
                    hello.worker_id, [f"num_slots {hello.layout.num_slots}, expected {streams + 1} to {8 * streams + 1}"]
                )
            layout = afd_layout(facts, config.spec, config.shard, attention_end=False, ubatches=ubatches)
            return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

        return answer

    def _answer_kv(self) -> Answer:
        config = self._config
        layout = kv_link_layout(self._facts, decode_end=False)
        return lambda _hello: Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

    def _wishes(self) -> list[PeerWish]:
        part, config = self._part, self._config
        if part is None:
            return []
        wishes: list[PeerWish] = []
        side, decode_side = part.worker.afd, part.decode_side
        if config.role is Role.ATTENTION:

            def afd_hello(info: WorkerInfo) -> Hello:
                ubatches = num_ubatches(config.spec, config.role)
                layout = afd_layout(self._facts, config.spec, info.shard, attention_end=True, ubatches=ubatches)
                return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

            def add_ffn(info: WorkerInfo, link: Link) -> None:
                side.add_link(info.shard.index, link)

            wishes.append(PeerWish(role=Role.FFN, hello=afd_hello, linked=side.peers, add_link=add_ffn))
        if decode_side is not None:

            def kv_hello(_info: WorkerInfo) -> Hello:
                layout = kv_link_layout(self._facts, decode_end=True)
                return Hello(worker_id=config.worker_id, epoch=config.epoch, layout=layout)

            def add_prefill(_info: WorkerInfo, link: Link) -> None:
                decode_side.add_link(link)
                assert self._host is not None
                self._host.wakeup.ring()

            wishes.append(PeerWish(role=Role.PREFILL, hello=kv_hello, linked=decode_side.peers, add_link=add_prefill))
        return wishes

    def _await_peers(self, peers: PeerKeeper) -> None:
        """Wait for FFN workers, without whom nothing can be computed; and a little for a prefill worker, who is only better."""
        if self._part is None:
            return
        side, decode_side = self._part.worker.afd, self._part.decode_side
        self._message = "waiting for FFN workers"
        deadline = time.monotonic() + _PEERS_TIMEOUT_S
        while not side.complete and not self._stop.is_set():
            peers.check()
            if isinstance(peers.last_refusal, LayoutMismatch):
                raise peers.last_refusal
            if time.monotonic() > deadline:
                raise Unavailable(f"FFN workers for all shards did not come within {_PEERS_TIMEOUT_S:g} s")
            time.sleep(_READY_POLL_S)
        self._message = "waiting for a prefill worker"
        deadline = time.monotonic() + _PREFILL_TIMEOUT_S
        while decode_side is not None and not decode_side.peers() and not self._stop.is_set() and time.monotonic() < deadline:
            peers.check()
            time.sleep(_READY_POLL_S)

    # ---- what others see ---------------------------------------------------------------------------------------

    def _describe(self) -> WorkerInfo:
        config, facts = self._config, self._facts
        return WorkerInfo(
            worker_id=config.worker_id,
            deployment=config.deployment,
            pool=config.pool,
            role=config.role,
            model=config.model,
            revision=config.revision,
            fingerprint=facts.fingerprint,
            epoch=config.epoch,
            endpoint=Endpoint(rpc=self._rpc.address, data="" if self._listener is None else self._listener.address),
            pid=os.getpid(),
            host=socket.gethostname(),
            shard=config.shard,
            # Whoever only answers peers must be found by them before they are ready themselves.
            ready=self._ready,
            draining=self._stop.is_set(),
            message=self._message or self._stalled(),
            max_model_len=facts.max_model_len,
            vocab_size=facts.config.vocab_size,
            block_size_tokens=facts.kv.block_size_tokens,
            max_num_seqs=config.spec.scheduler.max_num_seqs,
            max_queued_requests=config.spec.scheduler.max_queued_requests,
            num_experts=facts.config.num_experts,
            load=self._load(),
        )

    def _stalled(self) -> str:
        """What a loop that waits for FFN workers waits for, once that takes longer than any computing."""
        waits_s = 0.0 if self._part is None else self._part.worker.afd.waits_s
        return f"waiting for FFN workers to answer, for {waits_s:.0f} s" if waits_s > _STALLED_S else ""

    def _load(self) -> WorkerLoad:
        resident = psutil.Process().memory_info().rss
        placement = 0 if self._experts is None else self._experts.number
        if self._host is not None:
            load = self._host.load()
            return replace(load, resident_memory_bytes=resident, placement=placement)
        assert self._ffn is not None
        stats = self._ffn.stats
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
            num_peers=self._ffn.side.num_peers,
            num_ffn_rows=stats.num_rows,
            num_ffn_batches=stats.num_batches,
            resident_weight_bytes=sum(self._ffn.halves.resident_bytes.values()),
            resident_memory_bytes=resident,
            placement=placement,
            gauges={
                "num_free_slots": float(self._ffn.side.num_free_slots),
                "num_stale_messages": float(stats.num_stale_messages),
                "num_late_experts": float(sum(bank.num_late_loads for bank in self._ffn.halves.banks.values())),
                **sums,
                **self._window.look(sums),
            },
        )

    def _ready_facts(self) -> dict[str, str | int | float]:
        facts: dict[str, str | int | float] = {"address": self._rpc.address}
        if self._part is not None:
            facts["num_blocks"] = self._facts.num_blocks
            facts["resident_weight_bytes"] = sum(self._part.resident_bytes.values())
        elif self._ffn is not None:
            facts["resident_weight_bytes"] = sum(self._ffn.halves.resident_bytes.values())
        return facts
