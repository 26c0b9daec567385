"""How a person or a supervisor stops a serving process: the first signal asks, the second insists (control speed).

    starting:  first signal raises StopRequested where the main thread is
    serving:   first signal ends ``wait``
    stopping:  every further signal calls ``force``

Where Ray can't be asked any more, a named pipe of the run directory reaches the processes that it started.

Must not know: what is stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PIPE = "stop"


class StopRequested(BaseException):
    """A signal asked to stop while starting; no Exception, so that nothing on the way takes it for a failure."""


class StopSignals:
    """The process' signal handlers; main thread only.

    Args:
        force: called in the handler of a signal that comes while stopping; should not return.
    """

    def __init__(self, force: Callable[[], None]) -> None:
        self._force = force
        self._requested = False
        self._raises = True
        # Handlers run in the main thread, wherever it is: they may take no lock, so the wake-up is a byte in a pipe.
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested

    def install(self) -> None:
        """Handle SIGINT, SIGTERM and SIGHUP; again after a library has put handlers of its own."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise StopRequested if a signal has come: one that came inside a destructor or callback was swallowed there."""
        if self.requested:
            raise StopRequested

    def serving(self) -> None:
        """From now on the first signal raises nothing; ``wait`` sees it. Raises StopRequested if one has come already."""
        self._raises = False
        self.check()

    def stopping(self) -> None:
        """From now on every signal insists."""
        self._raises = False
        self._requested = True

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first signal; True when it has come."""
        if not self.requested:
            select.select([self._wake_read], [], [], timeout_s)
        return self.requested

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            self._force()
            return
        self._requested = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")
        if self._raises:
            raise StopRequested


def make_stop_pipe(run_dir: Path) -> None:
    """The pipe of ``run_dir``, before anybody waits at it."""
    os.mkfifo(run_dir / _PIPE, 0o600)


def wait_for_stop(run_dir: Path) -> None:
    """Block until ``tell_to_stop``."""
    (run_dir / _PIPE).read_bytes()  # opening waits for a writer, reading for its end


def tell_to_stop(run_dir: Path) -> None:
    """Wake all who wait for it."""
    with contextlib.suppress(OSError):  # nobody waits
        os.close(os.open(run_dir / _PIPE, os.O_WRONLY | os.O_NONBLOCK))
