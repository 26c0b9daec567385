"""Watches over a peer through the socket its link was opened on (step).

The socket stays open and nearly silent: its end of file says that the peer is gone. A pidfd says so even when some child of the
peer inherited the socket. Must not know: what the link carries.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

_LOOK_EVERY_NS = 10_000_000
_FAREWELL = b"C"
WAKE = b"W"  # carries nothing: it only makes the peer's socket readable


class PeerLiveness:
    """``lost`` says why the peer is gone once ``look`` has seen it; ``ended`` looks every 10 ms at most."""

    def __init__(self, sock: socket.socket, pid: int | None = None) -> None:
        """``sock`` is owned from now on; ``pid`` is the peer's, if it is on this machine."""
        sock.setblocking(False)
        self.lost: str | None = None
        self._sock = sock
        self._pidfd = -1
        self._next_look_ns = 0
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        if pid is not None and pid > 0 and hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(pid)
                self._poller.register(self._pidfd, select.POLLIN)
            except ProcessLookupError:
                self.lost = "its process died"
            except OSError:  # an old kernel, or another process namespace: the socket alone has to do
                self._pidfd = -1

    @property
    def fds(self) -> tuple[int, ...]:
        """What becomes readable when the peer goes, or wakes us."""
        return tuple(fd for fd in (self._sock.fileno(), self._pidfd) if fd >= 0)

    def ended(self) -> bool:
        """True when the peer is gone; asks the kernel every 10 ms at most."""
        if self.lost is None:
            now = time.monotonic_ns()
            if now < self._next_look_ns:
                return False
            self._next_look_ns = now + _LOOK_EVERY_NS
            self.look()
        return self.lost is not None

    def look(self) -> None:
        """Ask the kernel now; swallows the peer's wake-ups."""
        if self.lost is not None or self._sock.fileno() < 0:
            return
        for fd, _ in self._poller.poll(0):
            if fd == self._pidfd:
                self.lost = "its process died"
            else:
                self._read()

    def wake(self) -> None:
        """Make the peer's socket readable."""
        with contextlib.suppress(OSError):  # full: it is readable already; broken: ``look`` will tell
            self._sock.send(WAKE)

    def close(self) -> None:
        """Say farewell and hang up; idempotent."""
        if self._sock.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._sock.send(_FAREWELL)
        self._sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _read(self) -> None:
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self.lost = f"its connection broke: {error.strerror}"
            return
        if _FAREWELL in data:
            self.lost = "it closed the link"
        elif not data:
            self.lost = "its process died or lost its connection"
