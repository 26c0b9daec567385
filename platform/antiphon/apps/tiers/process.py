"""The process of experts that share memory: a tiered pool over whole models, one engine door per expert (control speed).

    gateways ══ one session per expert ══► TierMember's door ─► TieredPool ─► ModelPool ─► outputs, step by step
    directory ◄── a record per expert: resident, load times, queue      notes of gateways ──► what is expected next

To gateways each expert is a worker like any other, only that its first token may take a load. Everything but the engines' thread
belongs to one event loop in the main thread. Must not know: Ray, how requests are routed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from antiphon.apps.process.config import WorkerConfig, worker_id
from antiphon.apps.process.events import EventWriter
from antiphon.apps.process.lifecycle import SWITCH_INTERVAL_S
from antiphon.apps.process.pinning import pin
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.serve.plan import revision_of
from antiphon.apps.tiers.expert_servicer import ExpertServicer
from antiphon.apps.tiers.model_pool import ModelPool
from antiphon.apps.tiers.plan import TierMember, TierPool
from antiphon.apps.tiers.scratch import SHARED_MEMORY, Scratch, sweep_scratch
from antiphon.coe.serving.expert_health import Report, experts_topic
from antiphon.coe.tiers.policy import TierExpert, TierLimits
from antiphon.coe.tiers.pool import TieredPool
from antiphon.coe.tiers.standing import PoolOptions
from antiphon.core.directory import Directory
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.core.worker_info import WorkerLoad
from antiphon.directory.memory import open_directory
from antiphon.rpc.services import RpcServer
from antiphon.telemetry import configure_logging

_LOOK_S = 0.25  # between looks at standings and at what gateways expect
_RENEWALS_PER_LEASE = 3
_SERVE_TIMEOUT_S = 3600.0
_DISK_BYTES_PER_S, _LOAD_BYTES_PER_S = 5e8, 1e9  # until loads have been measured

_REPLACED = "another process with a newer epoch serves these experts"

_log = logging.getLogger(__name__)


class TierProcess:
    """Built in its process's main thread, which then calls ``run``; ``stop`` is safe from signal handlers."""

    def __init__(self, config: WorkerConfig, tier_pool: TierPool, events: EventWriter) -> None:
        """Read what every expert is; nothing is loaded yet.

        Raises:
            AntiphonError: a checkpoint or document can't be used.
        """
        configure_logging(config.log.level, json=config.log.format == "json", worker=config.worker_id, generation=config.epoch)
        self._config = config
        self._plan = tier_pool
        self._events = events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()
        self._stop_asked = False
        torch.set_num_threads(config.threads)
        sweep_scratch()  # first: one that was killed holds the memory that this one needs
        self._scratch = Scratch(_host_directory(tier_pool))
        self._model_pool = ModelPool(
            {member.expert: member.document.spec for member in tier_pool.members},
            {member.expert: Path(member.checkpoint) for member in tier_pool.members},
            self._scratch.path,
            begin=lambda: pin(config.cores),
        )
        self._doors = {member.expert: self._door(member) for member in tier_pool.members}
        self._pool: TieredPool[Request, None] = TieredPool(
            [_expert(member) for member in tier_pool.members],
            self._model_pool,
            self,
            TierLimits(
                resident_bytes=tier_pool.tiers.resident_memory_bytes,
                host_bytes=tier_pool.tiers.host_memory_bytes,
                fairness_window_s=tier_pool.tiers.fairness_window_s,
                max_group=min(member.document.spec.scheduler.max_num_seqs for member in tier_pool.members),
            ),
            options=PoolOptions(
                load_timeout_s=_SERVE_TIMEOUT_S,
                serve_timeout_s=_SERVE_TIMEOUT_S,
                max_waiting=sum(member.document.spec.scheduler.max_queued_requests for member in tier_pool.members) or 1024,
                prefetch=tier_pool.tiers.prefetch and tier_pool.tiers.host_memory_bytes > 0,
            ),
        )

    def run(self, started_s: float) -> None:
        """Load what fits, register every expert, and serve until ``stop``.

        Raises:
            AntiphonError: what ended the process.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()  # what imports made stays; each eviction's collection need not look at it
        asyncio.run(self._run(started_s))

    def stop(self) -> None:
        """Drain and end ``run``."""
        self._stop_asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._model_pool.close()
        self._scratch.close()

    async def serve(self, expert: str, asks: Sequence[Request], timeout_s: float) -> Sequence[None]:
        """See ``coe.tiers.pool.ExpertServer``: answers leave through the expert's door as they are made."""
        await self._model_pool.answer(expert, asks, self._doors[expert].deliver, timeout_s)
        return [None] * len(asks)

    # ---- the event loop ----------------------------------------------------------------------------------------

    async def _run(self, started_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        if self._stop_asked:
            return
        directory = open_directory(self._config.directory)
        servers: list[RpcServer] = []
        tasks: list[asyncio.Task[None]] = []
        try:
            async with self._pool:
                with self._events.timed("weights"):
                    await self._load_what_fits()
                with self._events.timed("listeners"):
                    for door in self._doors.values():
                        server = RpcServer([door.open(self._pool, self._loop)], host=self._config.host)
                        await server.start()
                        servers.append(server)
                        door.address = server.address
                await self._take_epochs(directory)
                if not await self._register(directory):
                    raise Unavailable(_REPLACED)
                self._events.stage("total", time.monotonic() - started_s)
                self._events.ready(**self._ready_facts())
                tasks = [asyncio.create_task(work) for work in (self._keep(directory), self._look(directory), self._wait())]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a loop that failed raises here
                await self._drain(directory)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in servers:
                await server.close()
            await directory.close()
            self._loop = None  # a signal that comes later finds nothing to wake

    async def _load_what_fits(self) -> None:
        """The first experts of the document are resident when serving starts; one that can't be loaded is found now."""
        room = self._plan.tiers.resident_memory_bytes
        for member in self._plan.members:
            size = _expert(member).memory_bytes
            if size > room:
                return
            room -= size
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            request = Request(
                request_id=RequestId(f"start-{member.expert}"),
                prompt_token_ids=(1,),
                sampling=sampling,
                eos_token_ids=frozenset(),
                arrival_s=time.monotonic(),
            )
            await self._pool.submit(member.expert, request, self._config.spec.directory.lease_s + _SERVE_TIMEOUT_S)

    async def _take_epochs(self, directory: Directory) -> None:
        """The supervisor claimed one for the first expert; the others' records need theirs, higher than any before."""
        for door in self._doors.values():
            if door.info.worker_id != self._config.worker_id:
                door.info = replace(door.info, epoch=await directory.next_epoch(door.info.worker_id))

    async def _register(self, directory: Directory) -> bool:
        """Write all records; False when a newer epoch has one. Raises Unavailable."""
        standing, stats = self._pool.standing(), self._pool.stats()
        memory = psutil.Process().memory_info().rss
        times = dict(stats.loads)
        for expert, door in self._doors.items():
            counts, tier = self._model_pool.counts(expert), standing[expert]
            load = WorkerLoad(
                num_waiting=tier.num_waiting,
                num_running=tier.num_running,
                num_free_blocks=counts.num_free_blocks if tier.is_resident else door.num_blocks,
                num_total_blocks=door.num_blocks,
                num_steps=counts.num_steps,
                num_prompt_tokens=counts.num_prompt_tokens,
                num_generation_tokens=counts.num_generation_tokens,
                num_preemptions=counts.num_preemptions,
                num_prefix_query_tokens=counts.num_prefix_query_tokens,
                num_prefix_hit_tokens=counts.num_prefix_hit_tokens,
                resident_weight_bytes=self._model_pool.resident_bytes(expert) if tier.is_resident else 0,
                resident_memory_bytes=memory,
                gauges=door.gauges(tier, times.get(expert), stats.num_loads.get(expert, 0)),
            )
            info = replace(door.info, ready=not self._stop_asked, draining=self._stop_asked, load=load)
            if not await directory.register(info, self._config.spec.directory.lease_s):
                return False
        return True

    async def _keep(self, directory: Directory) -> None:
        """Renew records: at once when an expert came or went, else a few times per lease."""
        lease_s = self._config.spec.directory.lease_s
        seen, renewed_s, reachable = None, 0.0, True
        while True:
            now = {name: (tier.tier, tier.num_waiting, tier.num_running) for name, tier in self._pool.standing().items()}
            if now != seen or time.monotonic() - renewed_s > lease_s / _RENEWALS_PER_LEASE:
                seen, renewed_s = now, time.monotonic()
                try:
                    current, reachable = await self._register(directory), True
                except Unavailable as error:
                    current = True
                    if reachable:
                        _log.warning("the leases can't be renewed, still trying: %s", error)
                    reachable = False
                if not current:
                    raise Unavailable(_REPLACED)
            await asyncio.sleep(min(_LOOK_S, lease_s / _RENEWALS_PER_LEASE))

    async def _look(self, directory: Directory) -> None:
        """What gateways expect, into the pool."""
        topic = experts_topic(self._plan.composition)
        while True:
            try:
                found = await directory.notes(topic)
            except Unavailable:
                found = {}  # said by _keep
            rates: dict[str, float] = {}
            for text in found.values():
                for name, rate in Report.from_json(text).expected.items():
                    rates[name] = rates.get(name, 0.0) + rate
            self._pool.foresee(rates)
            await asyncio.sleep(_LOOK_S)

    async def _wait(self) -> None:
        await self._stopped.wait()

    async def _drain(self, directory: Directory) -> None:
        end_s = time.monotonic() + self._config.drain_s
        try:
            await self._register(directory)
            while time.monotonic() < end_s and any(door.num_requests for door in self._doors.values()):  # noqa: ASYNC110 - bounded
                await asyncio.sleep(0.02)
            for door in self._doors.values():
                await directory.remove(door.info.worker_id, door.info.epoch)
        except Unavailable as error:
            _log.info("the records end with their leases: %s", error)

    # ---- what others see ---------------------------------------------------------------------------------------

    def _door(self, member: TierMember) -> ExpertServicer:
        spec, config = member.document.spec, self._config
        facts = resolve_model(spec, member.checkpoint, revision_of(spec))
        facts.checkpoint.close()
        assert facts.num_blocks is not None  # experts that share a process compute on CPUs
        return ExpertServicer(
            expert=member.expert,
            model_pool=self._model_pool,
            num_blocks=facts.num_blocks,
            info=ExpertServicer.record(
                member,
                facts,
                worker_id=worker_id(member.deployment, member.pool, config.index),
                epoch=config.epoch,
                pid=os.getpid(),
                host=socket.gethostname(),
            ),
        )

    def _ready_facts(self) -> dict[str, str | int | float]:
        resident = [name for name, tier in self._pool.standing().items() if tier.is_resident]
        return {
            "address": self._doors[self._plan.first.expert].address,
            "resident": ", ".join(resident),
            "resident_weight_bytes": sum(self._model_pool.resident_bytes(name) for name in resident),
        }


def _expert(member: TierMember) -> TierExpert:
    """What holding and moving it costs, before anything was measured. Raises InvalidInput when its files can't be looked at."""
    try:
        size = member.checkpoint_bytes()
    except OSError as error:
        raise InvalidInput(f"the checkpoint of expert {member.expert} can't be read: {error}", "spec.experts") from error
    return TierExpert(
        name=member.expert,
        memory_bytes=size if member.memory_bytes is None else member.memory_bytes,
        host_bytes=size,
        fetch_s=size / _DISK_BYTES_PER_S,
        load_s=size / _LOAD_BYTES_PER_S,
    )


def _host_directory(tier_pool: TierPool) -> Path | None:
    """A memory file system with room for the copies and one more, or None: a temporary directory, through the page cache."""
    needed = tier_pool.tiers.host_memory_bytes + max(_expert(member).host_bytes for member in tier_pool.members)
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed
    return SHARED_MEMORY if has_room else None
