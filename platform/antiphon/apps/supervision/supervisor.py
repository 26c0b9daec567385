"""Keeps one worker process running: claims its index, starts it, renews the claim, restarts it (control speed).

    CLAIMING ──► STARTING ──► READY ──exit──► BACKOFF ──► CLAIMING
        │            │          │                │
        │            │          └─ index lost ─► CLAIMING      (its process is stopped first)
        │            └─ exit or deadline: the first start FAILS at once, later ones go to BACKOFF
        └─ close(), from every state ─► STOPPED                too many failures in a row ─► FAILED

Claims: within a revision of the pool each replica holds a rank; ranks form groups of one worker per shard, and a group holds
a slot of the pool. The index, slot x shards + rank in the group, is then unique over revisions that overlap in a rolling
update, and every complete group holds the whole FFN. A lost replica's rank becomes free with its lease and goes to its
replacement, which gets the index of the lost one.

Must not know: Ray, or what the worker computes.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from antiphon.apps.process.config import WorkerConfig, worker_id
from antiphon.apps.serve.plan import PoolTemplate
from antiphon.apps.supervision.child_process import ChildProcess, describe_exit
from antiphon.apps.supervision.event_log import EventKind, EventLog, Fact
from antiphon.core.errors import DeadlineExceeded, Unavailable
from antiphon.core.ids import Epoch
from antiphon.directory.lease import BlockingDirectory

DEFAULT_ARGV = (sys.executable, "-m", "antiphon.apps.process.main")

_RENEWALS_PER_LEASE = 3
_STOP_MARGIN_S = 3.0  # beyond the drain time, before SIGKILL

logger = logging.getLogger(__name__)


class SupervisorState(enum.Enum):
    """Drawn in the module's docstring."""

    CLAIMING = "claiming"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """When a worker is given up, and how long to wait before each new start."""

    start_timeout_s: float = 600.0  # from process start to ready
    backoff_s: float = 0.2  # before the first restart; doubles with every failure in a row
    max_backoff_s: float = 15.0
    max_failures: int = 6  # in a row without ever being ready: one that was ready and died is started again however often
    stable_s: float = 60.0  # ready for so long, the next exit counts as the first failure


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """Where a supervised worker stands."""

    state: SupervisorState
    worker_id: str = ""
    epoch: int = 0
    pid: int = 0
    num_restarts: int = 0
    facts: Mapping[str, Fact] = field(default_factory=dict)
    message: str = ""


@dataclass(slots=True)
class _Claim:
    rank: int
    slot: int
    index: int


class WorkerSupervisor:
    """Supervises one worker process from a thread of its own, until closed.

    Args:
        template: the pool.
        directory: for claims and epochs; not closed here.
        owner: unique name of the replica that supervises.
        run_dir: where logs, configurations and the event log go.
        argv: the command of the worker process.
        limits: deadlines and backoff.
    """

    def __init__(
        self,
        template: PoolTemplate,
        *,
        directory: BlockingDirectory,
        owner: str,
        run_dir: Path,
        argv: Sequence[str] = DEFAULT_ARGV,
        limits: RestartLimits = RestartLimits(),
    ) -> None:
        self._template = template
        self._directory = directory
        self._owner = owner
        self._run_dir = run_dir
        self._argv = tuple(argv)
        self._limits = limits
        self._event_log = EventLog(run_dir)
        self._lease_s = template.document.spec.directory.lease_s
        self._changed = threading.Condition()
        self._status = WorkerStatus(state=SupervisorState.CLAIMING)
        self._error: BaseException | None = None
        self._closing = False
        self._wake_read, self._wake_write = os.pipe()
        self._claimed: _Claim | None = None
        self._epoch = Epoch(0)
        self._num_starts = 0
        self._thread = threading.Thread(target=self._run, name=f"supervisor-{template.pool}", daemon=True)
        self._thread.start()

    def status(self) -> WorkerStatus:
        """Where the worker stands now."""
        with self._changed:
            return self._status

    def check(self) -> None:
        """Raise what ended the supervision, if anything did: the worker could not be started, or kept failing."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def wait_ready(self, timeout_s: float) -> WorkerStatus:
        """Wait until the worker is ready.

        Raises:
            Unavailable: it could not be started; the message has the end of its log.
            DeadlineExceeded: it is not ready after ``timeout_s`` seconds.
        """
        ends = (SupervisorState.READY, SupervisorState.FAILED, SupervisorState.STOPPED)
        with self._changed:
            self._changed.wait_for(lambda: self._status.state in ends, timeout_s)
            status = self._status
        self.check()
        if status.state is not SupervisorState.READY:
            raise DeadlineExceeded(f"worker of pool {self._template.pool} is {status.state.value} after {timeout_s:g} s")
        return status

    def close(self) -> None:
        """Drain and stop the worker and give its rank back; idempotent."""
        with self._changed:
            already, self._closing = self._closing, True
            self._changed.notify_all()
        if already:
            self._thread.join()
            return
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- the supervisor's thread

    def _run(self) -> None:
        end = SupervisorState.STOPPED
        try:
            self._supervise()
        except BaseException as error:  # noqa: BLE001  # stored; check() and wait_ready() raise it
            self._error = error
            end = SupervisorState.FAILED
            self._event_log.write("failed", self._subject(), epoch=self._epoch, message=str(error))
        with contextlib.suppress(Unavailable):  # else it ends with its lease
            self._directory.release_index(self._template.document.metadata.name, self._rank_group(), self._owner)
        self._set(end, pid=0)

    def _supervise(self) -> None:
        num_failures = num_unready = 0
        while not self._closing:
            config = self._prepare()
            if config is None:
                return
            ready_s = self._run_child(config)
            if self._closing:
                return
            if ready_s is None:  # stopped by us, to take another index
                continue
            num_failures = 1 if ready_s >= self._limits.stable_s else num_failures + 1
            num_unready = num_unready + 1 if ready_s == 0.0 else 0
            if num_unready > self._limits.max_failures:
                raise Unavailable(f"{config.worker_id} failed {num_unready} times in a row; last: {self.status().message}")
            self._set(SupervisorState.BACKOFF)
            self._sleep(min(self._limits.max_backoff_s, self._limits.backoff_s * 2 ** (num_failures - 1)))

    def _prepare(self) -> WorkerConfig | None:
        """Claim an index and an epoch; None = closing."""
        self._set(SupervisorState.CLAIMING)
        give_up_s = time.monotonic() + self._limits.start_timeout_s
        accept_extra_s = time.monotonic() + 2 * self._lease_s
        num_shards = self._template.spec.parallelism.num_shards
        while not self._closing:
            try:
                claim = self._claim()
                # A rank beyond the pool's size is taken only when no lost replica's rank became free meanwhile.
                if claim.rank < max(self._template.spec.replicas, num_shards) or time.monotonic() > accept_extra_s:
                    self._claimed = claim
                    identity = worker_id(self._template.document.metadata.name, self._template.pool, claim.index)
                    self._epoch = self._directory.next_epoch(identity, self._epoch)
                    return self._template.worker(claim.index, self._epoch)
                self._directory.release_index(self._template.document.metadata.name, self._rank_group(), self._owner)
            except Unavailable as error:
                if time.monotonic() > give_up_s:
                    raise
                logger.warning("no index for a worker of pool %s yet: %s", self._template.pool, error)
            self._sleep(min(0.5, self._lease_s / _RENEWALS_PER_LEASE))
        return None

    def _claim(self) -> _Claim:
        name, pool, held = self._template.document.metadata.name, self._template.pool, self._claimed
        num_shards = self._template.spec.parallelism.num_shards
        rank = self._directory.claim_index(
            name, self._rank_group(), self._owner, self._lease_s, None if held is None else held.rank
        )
        group = f"{self._template.revision}:{rank // num_shards}"
        slot = self._directory.claim_index(name, pool, group, self._lease_s, None if held is None else held.slot)
        return _Claim(rank=rank, slot=slot, index=slot * num_shards + rank % num_shards)

    def _run_child(self, config: WorkerConfig) -> float | None:
        """Run one process until it exits; how long it was ready, in seconds. None = stopped by us."""
        self._num_starts += 1
        first = self._num_starts == 1
        child = ChildProcess(config, argv=self._argv, run_dir=self._run_dir, fork_server=self._fork_server(config))
        self._set(SupervisorState.STARTING, worker_id=config.worker_id, epoch=config.epoch, pid=child.pid)
        self._note("started", config, child)
        ready_at_s: float | None = None
        reason = ""
        superseded = False
        deadline_s = time.monotonic() + self._limits.start_timeout_s
        try:
            while not self._closing and not superseded:
                events = child.wait(self._lease_s / _RENEWALS_PER_LEASE, self._wake_read)
                for event in events:
                    match event.event:
                        case "loading":
                            self._note("loading", config, child, facts=event.facts)
                        case "stage":
                            self._note("stage", config, child, stage=event.name, seconds=event.seconds)
                        case "failed":
                            reason = event.message
                        case "ready":
                            ready_at_s = time.monotonic()
                            self._note("ready", config, child, facts=event.facts)
                            self._set(SupervisorState.READY, facts=event.facts)
                if child.exit_code is not None:
                    break
                if ready_at_s is None and time.monotonic() > deadline_s:
                    reason = f"it is not ready after {self._limits.start_timeout_s:g} s"
                    break
                superseded = not self._renew()
        finally:
            code = child.stop(config.drain_s + _STOP_MARGIN_S)
        reason = reason or f"it {describe_exit(code)}"
        self._note("exited", config, child, message=reason)
        with contextlib.suppress(Unavailable):  # else it ends with its lease
            self._directory.remove(config.worker_id, config.epoch)
        if self._closing or superseded:
            return None
        self._set(SupervisorState.STARTING, pid=0, message=reason)
        logger.warning("worker %s, epoch %d: %s", config.worker_id, config.epoch, reason)
        if first and ready_at_s is None:
            tail = child.log_tail()
            raise Unavailable(f"worker {config.worker_id} did not start: {reason}" + (f"\n{tail}" if tail else ""))
        return 0.0 if ready_at_s is None else time.monotonic() - ready_at_s

    def _fork_server(self, config: WorkerConfig) -> str | None:
        """Where to have the process from: not with what libraries read when they are imported, nor with cards."""
        pool = config.pool_spec
        plain = self._argv == DEFAULT_ARGV and not pool.env and not config.card and pool.worker_device == "cpu"
        return self._template.fork_server if plain else None

    def _renew(self) -> bool:
        """Renew the claim; False when the index went to somebody else while the store could not be reached."""
        try:
            claim = self._claim()
        except Unavailable as error:
            logger.warning("the claim of pool %s can't be renewed, still trying: %s", self._template.pool, error)
            return True
        kept = self._claimed is not None and claim.index == self._claimed.index
        self._claimed = claim
        return kept

    def _note(
        self,
        kind: EventKind,
        config: WorkerConfig,
        child: ChildProcess,
        *,
        stage: str = "",
        seconds: float = 0.0,
        message: str = "",
        facts: Mapping[str, Fact] | None = None,
    ) -> None:
        self._event_log.write(
            kind,
            f"{config.pool}/{config.index}",
            epoch=config.epoch,
            pid=child.pid,
            stage=stage,
            seconds=seconds,
            message=message,
            log=str(child.log_path),
            facts=facts,
        )

    def _rank_group(self) -> str:
        return f"{self._template.pool}@{self._template.revision}"

    def _subject(self) -> str:
        return self._template.pool if self._claimed is None else f"{self._template.pool}/{self._claimed.index}"

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)

    def _set(
        self,
        state: SupervisorState,
        *,
        worker_id: str | None = None,
        epoch: int | None = None,
        pid: int | None = None,
        facts: Mapping[str, Fact] | None = None,
        message: str | None = None,
    ) -> None:
        with self._changed:
            old = self._status
            self._status = WorkerStatus(
                state=state,
                worker_id=old.worker_id if worker_id is None else worker_id,
                epoch=old.epoch if epoch is None else epoch,
                pid=old.pid if pid is None else pid,
                num_restarts=max(0, self._num_starts - 1),
                facts=old.facts if facts is None else facts,
                message=old.message if message is None else message,
            )
            self._changed.notify_all()
