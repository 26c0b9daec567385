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
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from antiphon.apps.gateway_app import GatewayThread, RunGateway, gateway_config, port_facts
from antiphon.apps.journal import Journal, JournalEntry
from antiphon.apps.ray_runtime import RayRuntime
from antiphon.apps.serve_plan import GATEWAY, PoolTemplate, ServePlan, ServeSettings, plan_serve
from antiphon.apps.supervisor import DEFAULT_ARGV, RestartLimits, SupervisorState, WorkerSupervisor
from antiphon.core.errors import AntiphonError, Unavailable
from antiphon.core.spec import LLMDeployment
from antiphon.gateway.config import BoundPorts
from antiphon.gateway.directory import MemoryDirectory, open_directory
from antiphon.gateway.lease import BlockingDirectory
from antiphon.rpc.directory_service import DirectoryServer

T = TypeVar("T")
Say = Callable[[str], None]


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
        self._loop = _LoopThread()
        self._server: DirectoryServer | None = None
        self._directory: BlockingDirectory | None = None
        self._supervisors: list[WorkerSupervisor] = []
        self._gateway: GatewayThread | None = None
        self._gateway_ready = False
        self.directory_address = ""

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        redis_url = self._document.spec.directory.redis_url
        if redis_url is None:
            self._server = self._loop.run(DirectoryServer.start(MemoryDirectory()))
            self.directory_address = self._server.address
        else:
            self.directory_address = redis_url
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
        if self._server is not None:
            self._loop.run(self._server.close(0.0))
            self._server = None
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class RayDeployment:
    """One Serve application on a private Ray; the arguments are those of ``DirectDeployment``."""

    def __init__(
        self, document: LLMDeployment, *, checkpoint: str, run_dir: Path, settings: ServeSettings = ServeSettings()
    ) -> None:
        self._document = document
        self._checkpoint = checkpoint
        self._run_dir = run_dir
        self._settings = settings
        self._journal = Journal(run_dir)
        plan: ServePlan = plan_serve(document)
        self._name = plan.application
        # One processor more than the replicas reserve is for Serve's own actors.
        self._runtime = RayRuntime(run_dir, num_cpus=plan.num_cpus + 1, resources=plan.resources)
        self._deployed = False
        self.directory_address = ""

    def start(self, say: Say = lambda _text: None) -> None:
        """See ``LocalDeployment``."""
        say("Starting Ray")
        with self._journal.timed("ray"):
            self._runtime.start()
        say("Starting Ray Serve")
        with self._journal.timed("serve"):
            self._runtime.start_serve()
        from antiphon.apps.directory_actor import ensure_directory
        from antiphon.apps.serve_entry import application

        redis_url = self._document.spec.directory.redis_url
        host = self._settings.host or "127.0.0.1"
        say("Starting the directory")
        with self._journal.timed("directory"):
            address = ensure_directory(self._name, host=host) if redis_url is None else redis_url
        self.directory_address = address
        settings = dataclasses.replace(
            self._settings, checkpoint=self._checkpoint, directory=address, run_dir=str(self._run_dir), host=host
        )
        self._runtime.deploy(self._name, application(self._document, settings, pinned=True, sized=False))
        self._deployed = True

    def poll(self) -> bool:
        """See ``LocalDeployment``."""
        failed = [entry for entry in self._journal.read() if entry.kind == "failed"]
        if failed:
            raise Unavailable(failed[-1].message)
        state = self._runtime.state(self._name)
        if state.failed:
            raise Unavailable("; ".join([state.message, *state.deployments.values()]))
        return state.running

    def close(self, *, graceful: bool = True) -> None:
        """See ``LocalDeployment``."""
        if graceful and self._deployed:
            with contextlib.suppress(AntiphonError):  # what does not end by itself is ended with Ray
                self._runtime.delete(self._name)
        self._deployed = False
        self._runtime.stop()


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


class _LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="directory-server", daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
