"""Whether Ray's control process lives, asked of the system and not of Ray, which waits for it (control speed).

Must not know: what runs on that Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

import psutil

from antiphon.core.errors import Unavailable

CONTROL = "gcs_server"
_CONNECT_S = 1.0
_LOOK_S = 2.0  # between two connections to another's port


class ControlLost(Unavailable):
    """Ray's control process is gone: nothing can be asked of Ray any more, and its other processes will end."""


class ControlWatch:
    """Belongs to one thread.

    Args:
        look: how the process ended, in words; None = it lives.
    """

    def __init__(self, look: Callable[[], str | None]) -> None:
        self._look = look

    @classmethod
    def of_child(cls, name: str) -> ControlWatch | None:
        """The child of this process that has this name; None = there is none."""
        found = next((child for child in psutil.Process().children() if child.name() == name), None)
        return None if found is None else cls(lambda: _end_of(found))

    @classmethod
    def of_port(cls, address: str) -> ControlWatch:
        """Whoever listens at ``address``, on a Ray that others started."""
        host, _, port = address.rpartition(":")
        next_look_s = 0.0

        def look() -> str | None:
            nonlocal next_look_s
            if time.monotonic() < next_look_s:
                return None
            next_look_s = time.monotonic() + _LOOK_S
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            except ConnectionRefusedError:
                return f"does not listen at {address} any more"
            except OSError:  # slow is not gone
                return None
            return None

        return cls(look)

    def check(self) -> None:
        """Raise ControlLost once the process has ended."""
        how = self._look()
        if how is not None:
            raise ControlLost(
                f"Ray's control process {CONTROL} {how}, and Ray does not go on without it: requests in flight end, then this "
                "deployment. Start it again"
            )


def _end_of(process: psutil.Process) -> str | None:
    """How a child of this process ended; None = it lives. Its status stays for whoever started it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return None
    try:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        found = None
    if found is None:
        return "has ended"
    if found.si_code == os.CLD_EXITED:
        return f"ended with status {found.si_status}"
    return f"was killed by {signal.Signals(found.si_status).name}"
