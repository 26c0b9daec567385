"""One run of ``antiphon serve`` on this machine: from its private directory to the last process gone (control speed).

    with ServeSession(serving, settings) as session:
        session.start(show)          everything is ready, or an error says what is not
        session.watch(show)          until a signal
                                     then all of it goes: application, Ray, processes, directories, shared memory

``show`` gets the event log's entries as they come. Must not know: how anything is shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from antiphon.apps.devices import deal
from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import door_trust, door_url
from antiphon.apps.serve.host import (
    OrphanReaper,
    adopt_orphans,
    end_descendants,
    give_key,
    make_run_dir,
    remove_tree,
    sweep_run_dirs,
    take_key_back,
)
from antiphon.apps.serve.kernels import ensure_kernels, kernels_missing
from antiphon.apps.serve.local import DirectDeployment, RayDeployment, read_event_logs, running_of
from antiphon.apps.serve.plan import GATEWAY, ServeSettings
from antiphon.apps.serve.stop_signals import StopSignals
from antiphon.apps.supervision.event_log import EventLog, EventLogEntry
from antiphon.apps.supervision.log_mirror import LogMirror
from antiphon.apps.supervision.quiet_streams import QuietStreams
from antiphon.apps.tiers.scratch import sweep_scratch
from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import Unavailable
from antiphon.device.driver import look_for_cards
from antiphon.directory.lease import BlockingDirectory
from antiphon.directory.memory import open_directory
from antiphon.gateway.config import BoundPorts
from antiphon.models.loading.progress import Watch
from antiphon.models.loading.source import resolve

Show = Callable[[Sequence[EventLogEntry]], None]
Say = Callable[[str], None]

_POLL_S = 0.1
_WATCH_S = 0.5
_LEFTOVER_GRACE_S = 2.0
_RECORDS_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What runs once everything is ready."""

    ports: BoundPorts
    workers: tuple[WorkerRecord, ...]
    entries: tuple[EventLogEntry, ...]
    ray_commands: tuple[str, ...] = ()  # by which a person looks at Ray
    notes: tuple[str, ...] = ()  # what they should know of it


class ServeSession:
    """Main thread only: it owns the process' signals and standard streams until closed.

    Args:
        serving: what to serve.
        settings: how its processes are run.
        with_ray: over Ray Serve; otherwise the same processes directly.
        log_dir: where logs are copied while they grow; None = nowhere.
    """

    def __init__(self, serving: Serving, settings: ServeSettings, *, with_ray: bool = True, log_dir: Path | None = None) -> None:
        self._serving = serving
        self._settings = settings
        self._with_ray = with_ray
        self._ready = False
        self._closed = False
        self._deployment: RayDeployment | DirectDeployment | None = None
        adopt_orphans()
        sweep_run_dirs()
        sweep_scratch()
        self.num_workers = serving.num_workers
        self.run_dir = make_run_dir()
        self.streams = QuietStreams(self.run_dir / "host.log")
        give_key(self.run_dir)
        self._reaper = OrphanReaper(self.run_dir)
        self._event_log = EventLog(self.run_dir)
        self._mirror = LogMirror(self._logs, log_dir)
        self._signals = StopSignals(self._force)
        self._signals.install()

    def entries(self) -> list[EventLogEntry]:
        """Everything that has happened so far."""
        return read_event_logs(self._serving, self.run_dir)

    @property
    def serving(self) -> Serving:
        """What is served; with the directories of checkpoints once they are there."""
        return self._serving

    def start(
        self, show: Show, say: Say, watch: Watch | None = None, check: Callable[[Serving], None] = lambda _serving: None
    ) -> Ready:
        """Start everything and wait until it is ready; ``say`` gets what is being done, ``watch`` how far downloads are.

        ``check`` raises what is wrong with models, once all of them are on this machine and before anything is started. The
        settings' ``start_timeout_s`` begins there: downloads, conversions and the building of kernels have deadlines of their own.

        Raises:
            AntiphonError: cards or the model can't be had, or something could not be started; the message has the end of its log.
            StopRequested: a signal came.
        """

        def step(text: str) -> None:
            self._signals.install()  # Ray has handlers of its own
            self._signals.check()
            say(text)

        settings = replace(self._settings, cards=deal(self._serving.deployments, look_for_cards))
        checkpoints = {}
        with self._event_log.timed("checkpoint"):
            for document in self._serving.deployments:
                model = document.spec.model
                step(f"Looking for {model.uri}")
                checkpoints[document.metadata.name] = str(resolve(model.uri, model.revision, watch=watch))
                draft = document.spec.speculation.model if document.spec.speculation is not None else None
                if draft is not None and draft.uri is not None:  # workers find it where it was put
                    step(f"Looking for {draft.uri}")
                    resolve(draft.uri, draft.revision, watch=watch)
        self._serving = replace(self._serving, checkpoints=checkpoints)
        check(self._serving)
        self._check_artifacts(step)
        if kernels_missing() is not None:
            with self._event_log.timed("kernels"):
                ensure_kernels(step)
        deadline = time.monotonic() + self._settings.start_timeout_s
        kind = RayDeployment if self._with_ray else DirectDeployment
        deployment = kind(self._serving, run_dir=self.run_dir, settings=settings)
        self._deployment = deployment
        deployment.start(step)
        num_processes = self._serving.num_processes
        step(f"Starting {num_processes} worker{'' if num_processes == 1 else 's'}")
        while not deployment.poll():
            self._signals.check()
            show(self.entries())
            self._mirror.sync()
            if time.monotonic() > deadline:
                raise Unavailable(self._what_is_missing())
            time.sleep(_POLL_S)
        workers = self._records(deployment)
        entries = self.entries()
        show(entries)
        ports = running_of(entries).ports
        if ports is None:
            raise Unavailable("the gateway did not say where it listens")
        self._await_gateway(ports)
        self._ready = True
        self._signals.serving()
        if isinstance(deployment, RayDeployment):
            commands, notes = tuple(deployment.ray_view().commands()), deployment.notes
        else:
            commands, notes = (), ()
        return Ready(ports=ports, workers=workers, entries=tuple(entries), ray_commands=commands, notes=notes)

    def watch(self, show: Show) -> None:
        """Serve until a signal. Raises Unavailable when a pool is given up."""
        assert self._deployment is not None
        while not self._signals.wait(_WATCH_S):
            show(self.entries())
            self._mirror.sync()
            self._deployment.poll()

    def close(self) -> None:
        """Stop everything and remove every trace; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._signals.stopping()
        if self._deployment is not None:
            # Nobody can be in the middle of a request that was never served.
            self._deployment.close(graceful=self._ready)
        if self.must_leave_hard:
            end_descendants(_LEFTOVER_GRACE_S, spared=self._reaper.pids)
        else:
            self._reaper.close()
            end_descendants(_LEFTOVER_GRACE_S)
        take_key_back(self.run_dir)
        self._remove_files()
        self.streams.close()

    @property
    def must_leave_hard(self) -> bool:
        """Whether this process has to end by ``os._exit`` once closed: Ray's library in it can't end without its control process.

        The reaper looks after it for replicas that are no descendants.
        """
        return isinstance(self._deployment, RayDeployment) and self._deployment.is_ray_lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _records(self, deployment: RayDeployment | DirectDeployment) -> tuple[WorkerRecord, ...]:
        """The workers as the directory has them; a renewal may still be on its way."""
        deadline = time.monotonic() + _RECORDS_DEADLINE_S
        names = self._serving.models
        with BlockingDirectory(open_directory(deployment.directory_address)) as directory:
            while True:
                records = tuple(record for record in directory.workers() if record.info.deployment in names and record.info.ready)
                if len(records) >= self.num_workers:
                    return records
                if time.monotonic() > deadline:
                    raise Unavailable(f"{len(records)} of {self.num_workers} workers are ready in the directory")
                time.sleep(_POLL_S)

    def _check_artifacts(self, step: Say) -> None:
        """Routers would find a wrong artifact themselves, but only once everything else runs.

        Raises:
            CheckpointInvalid: an artifact can't be loaded; the message names it.
            InvalidInput: it does not fit its document.
        """
        from antiphon.coe.routing.router import Router
        from antiphon.coe.serving.artifacts import load

        for composition in self._serving.compositions:
            if composition.spec.router.artifact is not None:
                step(f"Looking at {composition.spec.router.artifact.uri}")
            Router(composition.spec, load(composition))

    def _await_gateway(self, ports: BoundPorts) -> None:
        """Wait until the gateway has seen all workers, too: it looks into the directory now and then."""
        endpoint = self._serving.endpoint
        url = f"{door_url(endpoint, ports.host, ports.http_port)}/ready"
        deadline = time.monotonic() + _RECORDS_DEADLINE_S
        with httpx.Client(timeout=_POLL_S * 10, trust_env=False, verify=door_trust(endpoint)) as client:
            while True:
                try:
                    answer = client.get(url)
                    if answer.is_success and answer.json().get("ready_workers", 0) >= self.num_workers:
                        return
                    why = answer.text
                except httpx.HTTPError as error:
                    why = str(error)
                if time.monotonic() > deadline:
                    raise Unavailable(f"the gateway is not ready: {why}")
                time.sleep(_POLL_S)

    def _what_is_missing(self) -> str:
        entries = self.entries()
        ready = {entry.subject for entry in running_of(entries).workers}
        latest = {entry.subject: entry for entry in entries if entry.kind == "started"}
        parts = [f"not ready after {self._settings.start_timeout_s:g} s"]
        for subject in sorted(latest.keys() - ready):
            parts.append(f"{subject} is not ready; the end of its log:\n{tail(Path(latest[subject].log))}")
        if not latest:
            parts.append(f"no worker was started; the end of the log:\n{tail(self.run_dir / 'host.log')}")
        return "\n".join(parts)

    def _logs(self) -> dict[str, Path]:
        """Every log of the run directory, by a name that says whose it is."""
        found = {log.name: log for pattern in ("*.log", "*.jsonl") for log in self.run_dir.glob(pattern)}
        for name in self._serving.models if len(self._serving.deployments) > 1 else ():
            found |= {f"{name}-{log.name}": log for log in (self.run_dir / name).glob("*.log")}
        return found

    def gateway_logs(self) -> list[Path]:
        """Logs of the gateways."""
        return sorted(self.run_dir.rglob(f"{GATEWAY}-*.log"))

    def _remove_files(self) -> None:
        self._mirror.sync()
        remove_tree(self.run_dir)

    def _force(self) -> None:
        """In the handler of a second signal: end everything now, without touching streams that may be in use.

        The reaper finds who is no descendant: replicas on a Ray that was joined.
        """
        try:
            end_descendants(0.0, spared=self._reaper.pids)
            self._remove_files()
        finally:
            os._exit(130)


def tail(log: Path, num_lines: int = 20) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-num_lines:])
    except OSError as error:
        return f"(it can't be read: {error})"
