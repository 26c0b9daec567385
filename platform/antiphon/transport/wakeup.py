"""A wakeup: a file descriptor one thread or process rings and another sleeps on (step).

Must not know: what a ring means, or who sleeps.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


class Wakeup:
    """Rings coalesce: however often it rang, one ``clear`` silences it. An eventfd on Linux, a pipe elsewhere."""

    __slots__ = ("_write", "fd")

    def __init__(self, fd: int | None = None) -> None:
        """A new wakeup, or one around an eventfd ``fd`` that a peer passed (owned from then on)."""
        if fd is not None:
            self.fd = self._write = fd
        elif hasattr(os, "eventfd"):
            self.fd = self._write = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.fd, self._write = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write, False)

    def ring(self) -> None:
        """Make the descriptor readable. Safe from any thread, and after ``close``."""
        # A full counter or pipe means that it rings already; a closed one that nobody sleeps on it any more.
        with contextlib.suppress(OSError):
            os.write(self._write, b"\x01\0\0\0\0\0\0\0")

    def clear(self) -> None:
        """Make the descriptor unreadable until the next ring."""
        with contextlib.suppress(OSError):
            while len(os.read(self.fd, 4096)) == 4096:
                pass

    def close(self) -> None:
        """Give the descriptors back; idempotent."""
        fds, self.fd, self._write = {self.fd, self._write}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)

    def __enter__(self) -> Wakeup:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
