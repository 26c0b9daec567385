"""A deployment on this machine: worker processes, directory and gateway, over Ray Serve or directly (control speed).

Both kinds run the same supervisors, workers and gateway; the direct one leaves Ray out, for debugging and for tests. Who is
ready, where, and what went wrong stands in the event log of the run directory. Must not know: terminals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx
import psutil

from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import GatewayThread, door_trust, door_url, port_facts, ports_of, serving_config
from antiphon.apps.serve.plan import GATEWAY, GATEWAY_CPU, PoolTemplate, ServeSettings, plan_serve
from antiphon.apps.serve.ray_runtime import ApplicationState, RayRuntime, RayView
from antiphon.apps.serve.stop_signals import make_stop_pipe, tell_to_stop
from antiphon.apps.supervision.child_process import RUNTIME_VARIABLES
from antiphon.apps.supervision.directory_hosting import DirectoryHosting
from antiphon.apps.supervision.event_log import EventLog, EventLogEntry
from antiphon.apps.supervision.fork_server import ForkServer
from antiphon.apps.supervision.supervisor import DEFAULT_ARGV, RestartLimits, SupervisorState, WorkerSupervisor
from antiphon.core.document.serving import EndpointSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable
from antiphon.core.identity import own_identity
from antiphon.directory.lease import BlockingDirectory
from antiphon.directory.memory import open_directory
from antiphon.gateway.config import BoundPorts

Say = Callable[[str], None]

_APPLICATION = "antiphon"
_LOOK_S = 5.0  # between two questions to Serve
_GATEWAY_MARGIN_S = 10.0  # for its end, beyond that of the requests
_READY_S = 2.0  # for the gateway to say whether it is ready


class LocalDeployment(Protocol):
    """A deployment of this machine. ``start`` once, ``poll`` until it is ready and while it serves, ``close`` at the end."""

    @property
    def directory_address(self) -> str:
        """Where its workers register, once it was started."""
        ...

    def start(self, say: Say) -> None:
        """Start everything, without waiting for it to be ready; ``say`` gets what is being done. Raises AntiphonError."""
        ...

    def poll(self) -> bool:
        """True when every pool and the gateway are ready. Raises what keeps them from it for good."""
        ...

    def close(self, *, graceful: bool = True) -> None:
        """Stop everything; ``graceful`` lets requests in flight end within the drain time. Idempotent."""
        ...


class DirectDeployment:
    """Supervisors, directory and gateway in this process; workers are its children.

    Args:
        document: what to serve: one deployment, or several documents together.
        checkpoint: directory of its model; None where ``document`` has them.
        run_dir: takes logs, configurations and the event log.
        settings: how processes are run.
    """

    def __init__(
        self,
        document: LLMDeployment | Serving,
        *,
        checkpoint: str | None = None,
        run_dir: Path,
        settings: ServeSettings = ServeSettings(),
    ) -> None:
        self._serving = _as_serving(document, checkpoint)
        self._run_dir = run_dir
        self._settings = settings
        own_identity()  # before any process is started: it goes with the environment
        self._host = DirectoryHosting(self._serving.redis_url)
        self._forks: ForkServer | None = None
        self._directory: BlockingDirectory | None = None
        self._supervisors: list[WorkerSupervisor] = []
        self._gateway: GatewayThread | None = None
        self._gateway_ready = False
        self._answers = False  # the gateway has seen the workers in the directory

    @property
    def directory_address(self) -> str:
        """See ``LocalDeployment``."""
        return self._host.address

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        self._forks = ForkServer.start(self._run_dir, RUNTIME_VARIABLES)
        self._directory = BlockingDirectory(open_directory(self.directory_address))
        for document in self._serving.deployments:
            self._supervise(document, self._directory)
        config = serving_config(self._serving, drain_s=self._settings.drain_s)
        self._gateway = GatewayThread(config, self.directory_address)

    def _supervise(self, document: LLMDeployment, directory: BlockingDirectory) -> None:
        name = document.metadata.name
        tier_pool = self._serving.tier_pool_of(name)
        if tier_pool is not None and tier_pool.first.deployment != name:
            return  # the first one's process serves it too
        run_dir = self._serving.run_dir_of(name, self._run_dir)
        run_dir.mkdir(exist_ok=True)
        for pool in plan_serve(document).pools:
            template = PoolTemplate(
                document=document,
                pool=pool.name,
                checkpoint=self._serving.checkpoints[name],
                directory=self.directory_address,
                host=self._settings.host or "127.0.0.1",
                drain_s=self._settings.drain_s,
                log=self._settings.log,
                tier_pool=tier_pool,
                cards=self._settings.cards.get((name, pool.name), ()),
                fork_server=None if self._forks is None else self._forks.address,
            )
            for replica in range(pool.num_replicas):
                self._supervisors.append(
                    WorkerSupervisor(
                        template,
                        directory=directory,
                        owner=f"direct-{id(self)}-{replica}",
                        run_dir=run_dir,
                        argv=self._settings.worker_argv or DEFAULT_ARGV,
                        limits=RestartLimits(start_timeout_s=self._settings.start_timeout_s),
                    )
                )

    def poll(self) -> bool:
        """See ``LocalDeployment``."""
        for supervisor in self._supervisors:
            supervisor.check()
        if self._forks is not None:
            self._forks.revive()
        assert self._gateway is not None
        self._gateway.check()
        if not self._gateway_ready and self._gateway.is_open:
            bound = self._gateway.wait_open(0.0)
            EventLog(self._run_dir).write("ready", GATEWAY, pid=os.getpid(), facts=port_facts(bound))
            self._gateway_ready = True
        if not self._gateway_ready or not all(s.status().state is SupervisorState.READY for s in self._supervisors):
            return False
        self._answers = self._answers or _is_ready(self._serving.endpoint, self._gateway.wait_open(0.0))
        return self._answers

    def close(self, *, graceful: bool = True) -> None:
        """See ``LocalDeployment``."""
        if self._gateway is not None:
            self._gateway.close()
        stoppers = [threading.Thread(target=s.close) for s in self._supervisors]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()
        if self._forks is not None:
            self._forks.close()
        if self._directory is not None:
            self._directory.close()
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _is_ready(endpoint: EndpointSpec, bound: BoundPorts) -> bool:
    """Whether a gateway of this machine would take requests now."""
    url = f"{door_url(endpoint, bound.host, bound.http_port)}/ready"
    try:
        return httpx.get(url, timeout=_READY_S, trust_env=False, verify=door_trust(endpoint)).status_code == 200
    except (httpx.HTTPError, OSError):
        return False


class RayDeployment:
    """One Serve application on a private Ray, whatever the number of documents; the arguments are those of ``DirectDeployment``.

    The directory is in this process unless the document names a Redis: it outlives every gateway and worker.
    """

    def __init__(
        self,
        document: LLMDeployment | Serving,
        *,
        checkpoint: str | None = None,
        run_dir: Path,
        settings: ServeSettings = ServeSettings(),
    ) -> None:
        self._serving = _as_serving(document, checkpoint)
        self._settings = dataclasses.replace(settings, run_dir=str(run_dir), host=settings.host or "127.0.0.1")
        self._run_dir = run_dir
        self._event_log = EventLog(run_dir)
        plans = [plan_serve(one) for one in self._serving.deployments]
        num_routers = max((c.spec.router.replicas for c in self._serving.compositions), default=0)
        num_cpus = sum(plan.num_cpus for plan in plans) + (num_routers + self._serving.endpoint.replicas) * GATEWAY_CPU
        self._num_cpus = num_cpus
        # One processor more than the replicas reserve is for Serve's own actors.
        self._runtime = RayRuntime(
            run_dir,
            num_cpus=num_cpus + 1,
            resources={},
            address=settings.ray_address,
            dashboard=settings.ray_dashboard,
            drain_s=settings.drain_s,
        )
        own_identity()  # before any process is started: it goes with the environment
        self._host = DirectoryHosting(self._serving.redis_url)
        self._forks: ForkServer | None = None
        self._deployed = False
        self._next_look_s = 0.0
        self.notes: tuple[str, ...] = ()  # what a person should know about a joined Ray
        self._state = ApplicationState(status="NOT_STARTED")

    @property
    def directory_address(self) -> str:
        """See ``LocalDeployment``."""
        return self._host.address

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        self._forks = ForkServer.start(self._run_dir, RUNTIME_VARIABLES)  # it imports while Ray starts
        say("Joining Ray" if self._runtime.is_joined else "Starting Ray")
        with self._event_log.timed("ray"):
            self._runtime.start()
        say("Starting Ray Serve")
        options = self._look_around() if self._runtime.is_joined else {}
        with self._event_log.timed("serve"):
            self._runtime.start_serve()
        if self._runtime.is_joined and self._runtime.state(_APPLICATION).status != "NOT_STARTED":
            raise Unavailable(f"this Ray serves an application {_APPLICATION} already: another `antiphon serve` joined it")
        from antiphon.apps.serve_entry import application_of

        make_stop_pipe(self._run_dir)
        forks = None if self._forks is None else self._forks.address
        settings = dataclasses.replace(self._settings, directory=self._host.address, fork_server=forks)
        run_dirs = {}
        for document in self._serving.deployments:
            run_dir = self._serving.run_dir_of(document.metadata.name, self._run_dir)
            run_dir.mkdir(exist_ok=True)
            run_dirs[document.metadata.name] = str(run_dir)
        self._runtime.deploy(_APPLICATION, application_of(self._serving, settings, run_dirs, options))
        self._deployed = True

    def ray_view(self) -> RayView:
        """How to look at the Ray that serves; once it was started."""
        return self._runtime.view

    def _look_around(self) -> dict[str, Any]:
        """What every replica needs on a Ray of somebody else's."""
        from antiphon.apps.on_ray.joining import look_at_node, options_for

        node = look_at_node(self._num_cpus)
        self.notes = tuple(node.warnings())
        return options_for(node, self._run_dir)

    def poll(self) -> bool:
        """See ``LocalDeployment``."""
        self._runtime.check()
        if self._forks is not None:
            self._forks.revive()
        entries = read_event_logs(self._serving, self._run_dir)
        failed = [entry for entry in entries if entry.kind == "failed"]
        if failed:
            raise Unavailable(failed[-1].message)
        # Serve's answer costs a hundred times what the event log costs: it is asked when it may have changed, and now and then.
        num_ready = len({entry.subject for entry in entries if entry.kind == "ready"})
        complete = num_ready >= self._serving.num_processes + 1
        if time.monotonic() >= self._next_look_s or (complete and not self._state.running):
            self._state = self._runtime.state(_APPLICATION)
            self._next_look_s = time.monotonic() + _LOOK_S
        if self._state.failed:
            raise Unavailable("; ".join([self._state.message, *self._state.deployments.values()]))
        return self._state.running

    def close(self, *, graceful: bool = True) -> None:
        """See ``LocalDeployment``."""
        if self._runtime.is_lost:
            if graceful and self._deployed:
                self._end_requests()
        elif self._deployed and (graceful or self._runtime.is_joined):  # somebody else's Ray goes on
            if graceful:
                self._end_requests()  # Serve ends all at once, and workers without requests of their own, as FFN's are, leave first
            with contextlib.suppress(AntiphonError):  # what does not end by itself is ended with Ray
                self._runtime.delete(_APPLICATION)
        self._deployed = False
        self._runtime.stop()
        if self._forks is not None:
            self._forks.close()
        self._host.close()

    @property
    def is_ray_lost(self) -> bool:
        """Ray has lost its control process: it ends nothing for us, and this process can't end it in order."""
        return self._runtime.is_lost

    def _end_requests(self) -> None:
        """Let gateways close, before Ray ends workers or without it: when they have, nobody waits for an answer."""
        tell_to_stop(self._run_dir)
        deadline = time.monotonic() + self._settings.drain_s + _GATEWAY_MARGIN_S
        while time.monotonic() < deadline:
            of_gateways = [entry for entry in EventLog(self._run_dir).read() if entry.subject == GATEWAY]
            closed = {entry.pid for entry in of_gateways if entry.kind in ("exited", "failed")}
            if not any(psutil.pid_exists(entry.pid) for entry in of_gateways if entry.pid not in closed):
                return
            time.sleep(0.1)


def _as_serving(document: LLMDeployment | Serving, checkpoint: str | None) -> Serving:
    if isinstance(document, Serving):
        return document
    if checkpoint is None:
        raise InvalidInput("the model's directory is missing", "checkpoint")
    return Serving.alone(document, checkpoint)


def read_event_logs(serving: Serving, run_dir: Path) -> list[EventLogEntry]:
    """What has happened to all processes, oldest first; where there are several deployments, subjects begin with their name."""
    entries = EventLog(run_dir).read()
    if len(serving.deployments) == 1:
        return entries
    for document in serving.deployments:
        name = document.metadata.name
        found = EventLog(serving.run_dir_of(name, run_dir)).read()
        entries += [dataclasses.replace(entry, subject=f"{name}/{entry.subject}") for entry in found]
    return sorted(entries, key=lambda entry: entry.time_s)


def wait_ready(deployment: LocalDeployment, timeout_s: float) -> None:
    """Poll until it is ready.

    Raises:
        Unavailable: something could not be started, or is not ready after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not deployment.poll():
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready after {timeout_s:g} s")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What the event log says runs now."""

    ports: BoundPorts | None
    workers: tuple[EventLogEntry, ...]  # the latest "ready" of each worker, ordered


def running(run_dir: Path) -> Running:
    """Read the event log of a run directory."""
    return running_of(EventLog(run_dir).read())


def running_of(entries: Iterable[EventLogEntry]) -> Running:
    """What the event log's entries say."""
    ports, workers = None, {}
    for entry in entries:
        if entry.subject == GATEWAY and entry.kind == "ready":
            ports = ports_of(entry)
        elif entry.kind == "ready":
            workers[entry.subject] = entry
        elif entry.kind == "exited":
            workers.pop(entry.subject, None)
    return Running(ports=ports, workers=tuple(workers[subject] for subject in sorted(workers)))
