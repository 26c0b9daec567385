"""A deployment on this machine: worker processes, directory and gateway, over Ray Serve or directly (control speed).

Both kinds run the same supervisors, workers and gateway; the direct one leaves Ray out, for debugging and for tests. Who is
ready, where, and what went wrong stands in the journal of the run directory. Must not know: terminals.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from antiphon.apps.gateway_app import GatewayThread, RunGateway, gateway_config, port_facts
from antiphon.apps.journal import Journal, JournalEntry
from antiphon.apps.ray_runtime import ApplicationState, RayRuntime
from antiphon.apps.serve_plan import GATEWAY, PoolTemplate, ServeSettings, plan_serve
from antiphon.apps.supervisor import DEFAULT_ARGV, RestartLimits, SupervisorState, WorkerSupervisor
from antiphon.core.errors import AntiphonError, Unavailable
from antiphon.core.spec import LLMDeployment
from antiphon.gateway.config import BoundPorts
from antiphon.gateway.directory import MemoryDirectory, open_directory
from antiphon.gateway.lease import BlockingDirectory
from antiphon.rpc.directory_service import DirectoryServer

Say = Callable[[str], None]

_LOOK_S = 5.0  # between two questions to Serve
_HOSTING_DEADLINE_S = 10.0


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
        document: what to serve.
        checkpoint: directory of its model.
        run_dir: takes logs, configurations and the journal.
        settings: how processes are run.
        run_gateway: what runs as the gateway; None = the real one.
    """

    def __init__(
        self,
        document: LLMDeployment,
        *,
        checkpoint: str,
        run_dir: Path,
        settings: ServeSettings = ServeSettings(),
        run_gateway: RunGateway | None = None,
    ) -> None:
        self._document = document
        self._checkpoint = checkpoint
        self._run_dir = run_dir
        self._settings = settings
        self._run_gateway = run_gateway
        self._host = DirectoryHosting(document.spec.directory.redis_url)
        self._directory: BlockingDirectory | None = None
        self._supervisors: list[WorkerSupervisor] = []
        self._gateway: GatewayThread | None = None
        self._gateway_ready = False

    @property
    def directory_address(self) -> str:
        """See ``LocalDeployment``."""
        return self._host.address

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        self._directory = BlockingDirectory(open_directory(self.directory_address))
        for pool in plan_serve(self._document).pools:
            template = PoolTemplate(
                document=self._document,
                pool=pool.name,
                checkpoint=self._checkpoint,
                directory=self.directory_address,
                host=self._settings.host or "127.0.0.1",
                drain_s=self._settings.drain_s,
                log=self._settings.log,
            )
            for replica in range(pool.num_replicas):
                self._supervisors.append(
                    WorkerSupervisor(
                        template,
                        directory=self._directory,
                        owner=f"direct-{id(self)}-{replica}",
                        run_dir=self._run_dir,
                        argv=self._settings.worker_argv or DEFAULT_ARGV,
                        limits=RestartLimits(start_timeout_s=self._settings.start_timeout_s),
                    )
                )
        config = gateway_config(self._document, self._checkpoint, drain_s=self._settings.drain_s)
        self._gateway = GatewayThread(config, self.directory_address, self._run_gateway)

    def poll(self) -> bool:
        """See ``LocalDeployment``."""
        for supervisor in self._supervisors:
            supervisor.check()
        assert self._gateway is not None
        self._gateway.check()
        if not self._gateway_ready and self._gateway.is_open:
            bound = self._gateway.wait_open(0.0)
            Journal(self._run_dir).write("ready", GATEWAY, pid=os.getpid(), facts=port_facts(bound))
            self._gateway_ready = True
        return self._gateway_ready and all(s.status().state is SupervisorState.READY for s in self._supervisors)

    def close(self, *, graceful: bool = True) -> None:
        """See ``LocalDeployment``."""
        if self._gateway is not None:
            self._gateway.close()
        stoppers = [threading.Thread(target=s.close) for s in self._supervisors]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()
        if self._directory is not None:
            self._directory.close()
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class RayDeployment:
    """One Serve application on a private Ray; the arguments are those of ``DirectDeployment``.

    The directory is in this process unless the document names a Redis: it outlives every gateway and worker.
    """

    def __init__(
        self, document: LLMDeployment, *, checkpoint: str, run_dir: Path, settings: ServeSettings = ServeSettings()
    ) -> None:
        self._document = document
        self._settings = dataclasses.replace(
            settings, checkpoint=checkpoint, run_dir=str(run_dir), host=settings.host or "127.0.0.1"
        )
        self._journal = Journal(run_dir)
        self._plan = plan_serve(document)
        # One processor more than the replicas reserve is for Serve's own actors.
        self._runtime = RayRuntime(run_dir, num_cpus=self._plan.num_cpus + 1, resources=self._plan.resources)
        self._host = DirectoryHosting(document.spec.directory.redis_url)
        self._deployed = False
        self._next_look_s = 0.0
        self._state = ApplicationState(status="NOT_STARTED")

    @property
    def directory_address(self) -> str:
        """See ``LocalDeployment``."""
        return self._host.address

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        say("Starting Ray")
        with self._journal.timed("ray"):
            self._runtime.start()
        say("Starting Ray Serve")
        with self._journal.timed("serve"):
            self._runtime.start_serve()
        from antiphon.apps.serve_entry import application

        settings = dataclasses.replace(self._settings, directory=self._host.address)
        self._runtime.deploy(self._plan.application, application(self._document, settings, pinned=True, sized=False))
        self._deployed = True

    def poll(self) -> bool:
        """See ``LocalDeployment``."""
        entries = self._journal.read()
        failed = [entry for entry in entries if entry.kind == "failed"]
        if failed:
            raise Unavailable(failed[-1].message)
        # Serve's answer costs a hundred times what the journal costs: it is asked when it may have changed, and now and then.
        num_ready = len({entry.subject for entry in entries if entry.kind == "ready"})
        complete = num_ready >= self._plan.num_workers + 1
        if time.monotonic() >= self._next_look_s or (complete and not self._state.running):
            self._state = self._runtime.state(self._plan.application)
            self._next_look_s = time.monotonic() + _LOOK_S
        if self._state.failed:
            raise Unavailable("; ".join([self._state.message, *self._state.deployments.values()]))
        return self._state.running

    def close(self, *, graceful: bool = True) -> None:
        """See ``LocalDeployment``."""
        if graceful and self._deployed:
            with contextlib.suppress(AntiphonError):  # what does not end by itself is ended with Ray
                self._runtime.delete(self._plan.application)
        self._deployed = False
        self._runtime.stop()
        self._host.close()


class DirectoryHosting:
    """A deployment's directory: the Redis it names, or a store of this process, served to the others.

    Args:
        redis_url: None = a store of this process.
    """

    def __init__(self, redis_url: str | None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        if redis_url is not None:
            self.address = redis_url
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="directory-server", daemon=True)
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(DirectoryServer.start(MemoryDirectory()), self._loop)
        self._server = starting.result(_HOSTING_DEADLINE_S)
        self.address = self._server.address

    def close(self) -> None:
        """Stop serving; idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(0.0), loop).result(_HOSTING_DEADLINE_S)
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(_HOSTING_DEADLINE_S)
            loop.close()


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
    """What the journal says runs now."""

    ports: BoundPorts | None
    workers: tuple[JournalEntry, ...]  # the latest "ready" of each worker, ordered


def running(run_dir: Path) -> Running:
    """Read the journal of a run directory."""
    ports, workers = None, {}
    for entry in Journal(run_dir).read():
        if entry.subject == GATEWAY and entry.kind == "ready":
            facts = entry.facts
            ports = BoundPorts(host=str(facts["host"]), http_port=int(facts["http_port"]), grpc_port=int(facts["grpc_port"]))
        elif entry.kind == "ready":
            workers[entry.subject] = entry
        elif entry.kind == "exited":
            workers.pop(entry.subject, None)
    return Running(ports=ports, workers=tuple(workers[subject] for subject in sorted(workers)))
