"""Everything one data-plane process owns, for any role (control speed around a hot loop).

Threads: the worker loop (this one, pinned to the worker's cores, with its compute threads), rpc, lease, peers. The others start
before the pinning, so that they do not inherit it. Must not know: Ray.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import psutil

from antiphon.apps.process import data_links
from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.engine_host import RpcThread
from antiphon.apps.process.events import EventWriter
from antiphon.apps.process.expert_host import ExpertHost
from antiphon.apps.process.lifecycle import SWITCH_INTERVAL_S, Watch, begin, device_of, fill_memory, record_of
from antiphon.apps.process.load_report import load_reported
from antiphon.apps.process.peers.keeper import PeerKeeper
from antiphon.apps.process.pinning import unpinned
from antiphon.apps.process.rebalancer import ModelShape, Rebalancer, adopt_newest
from antiphon.apps.process.roles.attention import AttentionRole
from antiphon.apps.process.roles.ffn import FFNRole
from antiphon.apps.process.roles.role import WorkerRole
from antiphon.apps.process.wiring.resolve import ModelFacts, resolve_model
from antiphon.apps.process.wiring.sizes import ffn_parallelism
from antiphon.core.ids import Endpoint, Role
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper, patiently
from antiphon.directory.memory import open_directory
from antiphon.telemetry import step_trace
from antiphon.transport.waiting import give_way
from antiphon.worker.tracing import StepRecorder

_DIRECTORY_S = 60.0  # for the first words with it; its supervisor has reached it a moment ago


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
        self._ready = False
        self._message = "starting"
        self._closers: list[Callable[[], None]] = []
        self._telemetry = begin(config)
        self._closers.append(self._telemetry.close)
        if config.shares_cores:
            give_way()
        with events.timed("weights"):
            self._facts: ModelFacts = resolve_model(config.spec, config.checkpoint, config.revision, device_of(config))
            with load_reported(self._facts, config, events):
                self._role: WorkerRole = (
                    FFNRole(config, self._facts) if config.role is Role.FFN else AttentionRole(config, self._facts, self._telemetry)
                )
        if self._role.part is not None:
            self._facts = self._role.part.facts  # with the cache's size, which a card tells once weights are on it
        self._trace_steps()
        self._lease: LeaseKeeper | None = None
        self._experts = self._expert_host()
        with events.timed("listeners"), unpinned():
            part = self._role.part
            enforcer = None if part is None else part.worker.enforcer
            self._rpc = RpcThread(
                config.host,
                part.engine if part is not None and config.role.generates else None,
                prepare=None if enforcer is None else enforcer.prepare,
                experts=self._experts,
                steps=StepRecorder(self._role.worker, worker_id=config.worker_id, role=config.role.value),
            )
            self._closers.append(self._rpc.close)
            self._role.attach(self._rpc.engine)
            self._listener = self._role.listen()
            self._directory = BlockingDirectory(open_directory(config.directory))
        self._closers.append(self._directory.close)

    def run(self, started_s: float) -> None:
        """Register, wait for peers, become ready, and serve until ``stop``.

        Raises:
            AntiphonError: what ended the worker.
        """
        config, experts = self._config, self._experts
        with unpinned():
            if experts is not None and config.role in (Role.FFN, Role.ATTENTION):
                newest = functools.partial(adopt_newest, experts, config.role, self._directory, config.deployment, config.revision)
                patiently(newest, _DIRECTORY_S, self._stop)
            keep = functools.partial(LeaseKeeper, self._directory, self._describe, config.spec.directory.lease_s)
            lease = self._lease = patiently(keep, _DIRECTORY_S, self._stop)
            peers = PeerKeeper(self._directory, config.deployment, config.revision, self._role.wishes(), data_links.connect)
        self._closers += [lease.close, peers.close]
        with lease:
            with self._events.timed("peers"):
                self._role.await_peers(peers, self._say, self._stop.is_set)
            if self._stop.is_set():
                return
            gc.collect()
            gc.freeze()  # what imports and weights made stays: no collection while serving need look at it
            self._ready, self._message = True, ""
            lease.renew_soon()
            self._balance()
            self._events.stage("total", time.monotonic() - started_s)
            self._events.ready(**self._ready_facts())

            lacked_peers = False

            def check() -> None:
                nonlocal lacked_peers
                peers.check()
                if lacked_peers != self._role.lacks_peers:
                    lacked_peers = not lacked_peers
                    lease.renew_soon()  # requests come, or don't, as the record says
                if self._rebalancer is not None:
                    self._rebalancer.check()

            watch = Watch(config, lease, others=check, stopping=self._stop, stop=self.stop)
            watch.start()
            if self._role.part is not None:
                fill_memory(self._role.part.cache, self._stop.is_set)
            self._loop()
            self._ready, self._message = False, "stopped"
        watch.raise_failure()

    def stop(self) -> None:
        """Drain and end ``run``."""
        self._stop.set()
        self._role.stop()

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._role.close()
        while self._closers:
            self._closers.pop()()

    def _trace_steps(self) -> None:
        """Let the worker keep what its steps do, where its environment asks for that; it is written when the worker ends."""
        config, directory = self._config, step_trace.asked_for()
        if directory is None:
            return
        trace = self._role.worker.wanted_trace = step_trace.StepTrace()

        def leave() -> None:
            step_trace.save(trace.taken(worker=config.worker_id, role=config.role.value), directory, config.epoch)

        self._closers.append(leave)

    def _say(self, message: str) -> None:
        self._message = message

    # ---- the loop ----------------------------------------------------------------------------------------------

    _rebalancer: Rebalancer | None = None

    def _loop(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._role.run(self._stop.is_set)

    # ---- experts -----------------------------------------------------------------------------------------------

    def _expert_host(self) -> ExpertHost | None:
        config, facts, part = self._config, self._facts, self._role.part
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
            ffn=self._role.ffn,
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

    # ---- what others see ---------------------------------------------------------------------------------------

    def _describe(self) -> WorkerInfo:
        config, facts = self._config, self._facts
        endpoint = Endpoint(rpc=self._rpc.address, data="" if self._listener is None else self._listener.address)
        record = record_of(
            config,
            endpoint,
            fingerprint=facts.fingerprint,
            max_model_len=facts.max_model_len,
            vocab_size=facts.config.vocab_size,
        )
        return replace(
            record,
            # Whoever only answers peers must be found by them before they are ready themselves.
            ready=self._ready and not self._role.lacks_peers,
            draining=self._stop.is_set(),
            message=self._message or self._role.stalled,
            block_size_tokens=facts.kv.block_size_tokens,
            num_experts=facts.config.num_experts,
            load=self._load(),
        )

    def _load(self) -> WorkerLoad:
        return replace(
            self._role.load(),
            resident_memory_bytes=psutil.Process().memory_info().rss,
            placement=0 if self._experts is None else self._experts.number,
        )

    def _ready_facts(self) -> dict[str, str | int | float]:
        facts: dict[str, str | int | float] = {"address": self._rpc.address}
        if self._role.part is not None and self._facts.num_blocks is not None:
            facts["num_blocks"] = self._facts.num_blocks
        facts["resident_weight_bytes"] = self._role.resident_weight_bytes
        return facts
