"""One worker process as its supervisor sees it: start, events, stop, log (control speed).

Must not know: why it is started, or what comes after it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from antiphon.apps.process.config import CONFIG_VARIABLE, WorkerConfig
from antiphon.apps.process.events import EVENTS_VARIABLE, WorkerEvent
from antiphon.apps.serve.host import open_private
from antiphon.apps.supervision.forked_process import ForkedProcess
from antiphon.core.errors import CorruptMessage, Unavailable
from antiphon.device.driver import CARDS_VARIABLE

logger = logging.getLogger(__name__)

_LAUNCHER = str(Path(__file__).with_name("child_launcher.py"))
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A compute thread that waits for its siblings spins this often before it sleeps. The default spins for milliseconds, which on a
# machine that also runs other workers takes the very processor that the sibling needs: steps get ten times slower.
RUNTIME_VARIABLES = {"GOMP_SPINCOUNT": "1000"}  # read when torch is imported
_TAIL_BYTES = 16_384
_FORK_DEADLINE_S = 60.0  # for a fork server that is still importing on a busy machine
_POLL_S = 0.1  # how late the exit of a child that closed its event pipe is noticed


class ChildProcess:
    """A running worker process. Belongs to the thread that started it: the process dies with that thread (Linux).

    Args:
        config: written to ``run_dir`` and named in the environment of the process.
        argv: the command.
        run_dir: where its configuration and log go.
        environment: variables on top of this process' own and the pool's.
        fork_server: address of the server to have the process from, where ``argv`` is the worker's own command; None, or a server
            that is gone: it is started from nothing, which takes seconds longer.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        argv: Sequence[str],
        run_dir: Path,
        environment: Mapping[str, str] | None = None,
        fork_server: str | None = None,
    ) -> None:
        name = f"{config.pool}-{config.index}"
        self.log_path = run_dir / f"{name}.log"
        config_path = run_dir / f"{name}.json"
        with os.fdopen(open_private(config_path), "w") as file:
            file.write(config.to_json())
        self._buffer = b""
        self._events, events_of_child = os.pipe()
        child_environment = {
            **os.environ,
            **RUNTIME_VARIABLES,
            **dict.fromkeys(_THREAD_VARIABLES, str(config.threads)),
            **config.pool_spec.env,
            **({CARDS_VARIABLE: config.card} if config.card else {}),
            **(environment or {}),
            CONFIG_VARIABLE: str(config_path),
            EVENTS_VARIABLE: str(events_of_child),
            "PYTHONUNBUFFERED": "1",
        }
        try:
            with os.fdopen(open_private(self.log_path, append=True), "ab") as log:
                self._log_start = log.tell()
                self._process = _forked(fork_server, child_environment, log.fileno(), events_of_child) or subprocess.Popen(
                    [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(events_of_child,),
                    env=child_environment,
                    start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's to pass on
                )
        except BaseException:
            os.close(self._events)
            raise
        finally:
            os.close(events_of_child)

    @property
    def pid(self) -> int:
        """Process id; also that of its session."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._process.poll()

    def wait(self, timeout_s: float, wake_fd: int) -> list[WorkerEvent]:
        """Events that have arrived, after at most ``timeout_s`` seconds; sooner on an event, exit, or byte at ``wake_fd``."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([wake_fd, *self._open_pipe()], [], [], left if self._open_pipe() else min(left, _POLL_S))
            if self._events in readable:
                return self._read_events()
            if wake_fd in readable:
                return []
        return self._read_events() if self._process.poll() is not None else []

    def terminate(self) -> None:
        """Ask it to drain and exit."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def stop(self, grace_s: float) -> int:
        """Make sure that it and what it started are gone: SIGTERM, after ``grace_s`` seconds SIGKILL. Idempotent.

        Returns:
            The exit code.
        """
        self.terminate()
        try:
            self._process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it may have started
        code = self._process.wait(timeout=30)
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
        return code

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of its log, of this start only."""
        try:
            with self.log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(the log can't be read: {error})"
        return "\n".join(text.rstrip().splitlines()[-num_lines:])

    def _open_pipe(self) -> list[int]:
        return [self._events] if self._events >= 0 else []

    def _read_events(self) -> list[WorkerEvent]:
        while self._open_pipe() and select.select([self._events], [], [], 0)[0]:
            chunk = os.read(self._events, 65_536)
            if not chunk:
                os.close(self._events)
                self._events = -1
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        events = []
        for line in lines:
            with contextlib.suppress(CorruptMessage):  # a line that is no event is not ours to fail on
                events.append(WorkerEvent.from_json(line))
        return events


def _forked(address: str | None, environment: Mapping[str, str], log: int, events: int) -> ForkedProcess | None:
    if address is None:
        return None
    try:
        return ForkedProcess(address, environment, log=log, events=events, timeout_s=_FORK_DEADLINE_S)
    except Unavailable as error:
        logger.warning("%s; the worker starts from nothing", error)
        return None


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
