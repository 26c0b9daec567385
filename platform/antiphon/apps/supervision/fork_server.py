"""Starts worker processes in milliseconds: one process imports what they all need, and each is a fork of it (control speed).

    python -m antiphon.apps.supervision.fork_server <module of the workers' main> <further module to import> ...
                                                             with the listening socket as standard input
    one connection a worker:
        request + [log, events, life] ──► fork ──► {"pid"} + [pidfd] ──exit──► {"status"}

Imports cost a worker some four seconds of a processor, which a restart under load does not have. Forking is right only while the
process has a single thread; it says so where it has more, and whoever asks starts a process of its own instead. A worker's life
hangs on ``life``, the read end of a pipe whose other end its supervisor holds: the kernel kills the worker when that closes, so
that this server's death ends nobody. Linux only.

Must not know: what a worker computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from antiphon.apps.process.events import EVENTS_VARIABLE

logger = logging.getLogger(__name__)

_LAUNCHER = str(Path(__file__).with_name("child_launcher.py"))
_MODULES = ("antiphon.apps.process.main", "antiphon.apps.process.worker_process")
_SOCKET_NAME = "fork"
_BACKLOG = 64
_MAX_REQUEST_BYTES = 4 << 20  # an environment; more is nobody of ours
_REQUEST_DEADLINE_S = 5.0
_LENGTH = struct.Struct("!I")
_NUM_DESCRIPTORS = 3
_UCRED = struct.Struct("3i")
_STOP_S = 5.0
_AGAIN_S = 5.0  # between two beginnings of a server that ends
# Read when numpy and torch are imported: pools of threads that exist before the fork would be missing after it. A worker sets the
# number of its own compute threads.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class ForkServer:
    """The server as its owner sees it. Belongs to the thread that made it, and dies with it.

    Args:
        run_dir: a directory of this user alone; takes the socket and the log.
        environment: variables on top of this process' own that libraries read when they are imported.
        modules: the one whose ``main`` a worker runs, and others to import before.
    """

    def __init__(self, run_dir: Path, environment: Mapping[str, str] | None = None, modules: tuple[str, ...] = _MODULES) -> None:
        self._run_dir = run_dir
        self._environment = {**(environment or {}), **_ONE_THREAD, "PYTHONUNBUFFERED": "1"}
        self._modules = modules
        self.address = str(run_dir / _SOCKET_NAME)
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        from antiphon.apps.serve.host import open_private

        self._began_s = time.monotonic()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self.address)
            listener.listen(_BACKLOG)  # before it has imported anything: requests wait for it
            with os.fdopen(open_private(self._run_dir / "fork-server.log", append=True), "ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), sys.executable, "-m", __name__, *self._modules],
                    stdin=listener.fileno(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._environment},
                    start_new_session=True,
                )

    @classmethod
    def start(
        cls, run_dir: Path, environment: Mapping[str, str] | None = None, modules: tuple[str, ...] = _MODULES
    ) -> ForkServer | None:
        """A server, where this system has what it takes and a socket fits ``run_dir``; else None, with a line in the log."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            return cls(run_dir, environment, modules)
        except OSError as error:  # a path too long for a socket, a kernel without pidfd, no process left
            logger.warning("no fork server, workers start from nothing: %s", error)
            return None

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def revive(self) -> None:
        """Another one at the same address where this one has ended, ``_AGAIN_S`` seconds after it began at the soonest.

        Workers that it forked live on, and meanwhile new ones start from nothing.
        """
        if self._process.poll() is None or time.monotonic() < self._began_s + _AGAIN_S:
            return
        logger.warning("the fork server has ended (%s), another one is started", self._process.returncode)
        self._forget_address()
        try:
            self._process = self._begin()
        except OSError as error:
            logger.warning("no fork server, workers start from nothing: %s", error)

    def _forget_address(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)

    def close(self) -> None:
        """End the server, and no worker; idempotent."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ChildProcessError):
            self._process.wait(_STOP_S)
        self._forget_address()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Server:
    """The loop; its listening socket is standard input."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._listener = socket.socket(fileno=os.dup(0))
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._workers: dict[int, socket.socket] = {}  # by process id

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._listener.fileno(), self._wake_read], [], [])
            if self._wake_read in readable:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._listener.fileno() in readable:
                connection, _ = self._listener.accept()
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            connection.settimeout(_REQUEST_DEADLINE_S)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            if _UCRED.unpack(credentials)[1] != os.geteuid():
                raise PermissionError("a stranger")
            environment, descriptors = _receive(connection)
            num_threads = len(os.listdir("/proc/self/task"))
            if num_threads != 1:
                raise RuntimeError(f"this process has {num_threads} threads, and can't be forked")
            pid = os.fork()
            if pid == 0:
                self._become_worker(connection, environment, descriptors)
            self._workers[pid] = connection  # whoever asked may have left by now; its end is taken notice of all the same
            pidfd = os.pidfd_open(pid)
            try:
                socket.send_fds(connection, [json.dumps({"pid": pid}).encode() + b"\n"], [pidfd])
            except OSError:
                os.kill(pid, signal.SIGKILL)  # nobody knows of it
                raise
            finally:
                os.close(pidfd)
        except Exception as error:  # noqa: BLE001  # whoever asked starts a process of its own, and the next may have better luck
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
            connection.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _become_worker(self, connection: socket.socket, environment: dict[str, str], descriptors: list[int]) -> None:
        """In the new process; does not return."""
        status = 1
        try:
            os.setsid()
            log, events, life = descriptors
            die_with(life)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            for descriptor in (null, log, self._wake_read, self._wake_write):
                os.close(descriptor)
            for other in (self._listener, connection, *self._workers.values()):
                other.close()
            os.environ.clear()
            os.environ.update(environment)

            os.environ[EVENTS_VARIABLE] = str(events)
            status = int(importlib.import_module(self._module).main())
        except BaseException:  # noqa: BLE001  # nothing may go on in this process as if it were the server
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._workers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                with self._workers.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def die_with(life: int) -> None:
    """Have the kernel kill this process when the other end of the pipe ``life`` closes; at once where it is closed already."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        if not os.read(life, 1):
            os._exit(1)


def _receive(connection: socket.socket) -> tuple[dict[str, str], list[int]]:
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _NUM_DESCRIPTORS)
    try:
        if len(header) != _LENGTH.size or len(descriptors) != _NUM_DESCRIPTORS:
            raise ValueError(f"{len(header)} bytes with {len(descriptors)} descriptors begin no request")
        (left,) = _LENGTH.unpack(header)
        if left > _MAX_REQUEST_BYTES:
            raise ValueError(f"an environment of {left} bytes")
        text = bytearray()
        while len(text) < left:
            chunk = connection.recv(left - len(text))
            if not chunk:
                raise ValueError("the request ends early")
            text += chunk
        environment = json.loads(text)
        if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
            raise ValueError("an environment is a map of strings")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return environment, descriptors


def main() -> None:
    """Import, then serve until killed."""
    modules = sys.argv[1:]
    server = _Server(modules[0])
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is shared with the workers stays shared: no collection writes into it
    server.run()


if __name__ == "__main__":
    main()
