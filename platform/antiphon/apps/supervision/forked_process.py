"""A worker process that a fork server has made, with the methods of ``subprocess.Popen`` that its supervisor uses (control speed).

Its life hangs on a pipe that this object holds: whoever ends without closing it takes the worker along. Must not know: why it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping

from antiphon.core.errors import Unavailable

_LENGTH = struct.Struct("!I")
_MAX_ANSWER_BYTES = 4096
_UNKNOWN_EXIT = 1  # the server, which alone could know, died before


class ForkedProcess:
    """One worker.

    Args:
        address: of the fork server.
        environment: the worker's whole environment.
        log: descriptor of its standard output and error.
        events: descriptor of its end of the event pipe.
        timeout_s: for the server to answer; it may still be importing.

    Raises:
        Unavailable: the server is gone, does not answer in time, or can't fork.
    """

    def __init__(self, address: str, environment: Mapping[str, str], *, log: int, events: int, timeout_s: float) -> None:
        life, self._life = os.pipe()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pidfd = -1
        self._buffer = b""
        self._code: int | None = None
        try:
            self._server.settimeout(timeout_s)
            self._server.connect(address)
            text = json.dumps(dict(environment)).encode()
            socket.send_fds(self._server, [_LENGTH.pack(len(text))], [log, events, life])
            self._server.sendall(text)
            answer, descriptors, _, _ = socket.recv_fds(self._server, _MAX_ANSWER_BYTES, 1)
            line, _, self._buffer = answer.partition(b"\n")
            said = json.loads(line or b"{}")
            if not descriptors:
                raise Unavailable(f"the fork server made no process: {said.get('error', 'it closed the connection')}")
            (self._pidfd,) = descriptors
            os.set_inheritable(self._pidfd, False)
            self.pid = int(said["pid"])
            self._server.setblocking(False)
        except (OSError, ValueError) as error:
            self._close()
            raise Unavailable(f"the fork server does not answer: {error}") from error
        except BaseException:
            self._close()
            raise
        finally:
            os.close(life)

    def poll(self) -> int | None:
        """Its exit code once it has ended; negative = the signal that ended it."""
        if self._code is None and self._ended(0.0):
            self._code = self._read_status()
            self._close()
        return self._code

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired when it runs on after ``timeout`` seconds."""
        if self._code is None and not self._ended(timeout):
            raise subprocess.TimeoutExpired("worker", timeout)
        code = self.poll()
        assert code is not None
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1e3))

    def _read_status(self) -> int:
        deadline = time.monotonic() + 1.0  # the server hears of the end when we do
        self._server.setblocking(True)
        while b"\n" not in self._buffer and (left := deadline - time.monotonic()) > 0:
            self._server.settimeout(left)
            try:
                chunk = self._server.recv(_MAX_ANSWER_BYTES)
            except OSError:
                break
            if not chunk:
                break
            self._buffer += chunk
        with contextlib.suppress(ValueError, KeyError):
            return int(json.loads(self._buffer.partition(b"\n")[0])["status"])
        return _UNKNOWN_EXIT

    def _close(self) -> None:
        self._server.close()
        for descriptor in (self._life, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self._life = self._pidfd = -1
