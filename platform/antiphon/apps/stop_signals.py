"""How a person or a supervisor stops a serving process: the first signal asks, the second insists (control speed).

    starting:  first signal raises StopRequested where the main thread is
    serving:   first signal ends ``wait``
    stopping:  every further signal calls ``force``

Must not know: what is stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """A signal asked to stop while starting; no Exception, so that nothing on the way takes it for a failure."""


class StopSignals:
    """The process' signal handlers; main thread only.

    Args:
        force: called in the handler of a signal that comes while stopping; should not return.
    """

    def __init__(self, force: Callable[[], None]) -> None:
        self._force = force
        self._requested = threading.Event()
        self._raises = True

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested.is_set()

    def install(self) -> None:
        """Handle SIGINT, SIGTERM and SIGHUP; again after a library has put handlers of its own."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def serving(self) -> None:
        """From now on the first signal raises nothing; ``wait`` sees it. Raises StopRequested if one has come already."""
        self._raises = False
        if self.requested:
            raise StopRequested

    def stopping(self) -> None:
        """From now on every signal insists."""
        self._raises = False
        self._requested.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first signal; True when it has come."""
        # Short waits in a loop: a handler runs only between two steps of the main thread.
        deadline = time.monotonic() + timeout_s
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            self._requested.wait(min(left, 0.2))
        return self.requested

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            self._force()
            return
        self._requested.set()
        if self._raises:
            raise StopRequested
