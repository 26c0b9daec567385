"""The listener of every transport: its threads leave what arrived here, its owner's loop collects it (control).

Must not know: how peers arrive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from antiphon.core.errors import AntiphonError, Unavailable, kept
from antiphon.transport.base import Answer, Hello, Link, Listener
from antiphon.transport.wakeup import Wakeup

_MAX_REFUSALS = 64  # of the latest peers turned away; older ones are forgotten


class QueuedListener(Listener):
    """Hands links, refusals and the first unexpected error from any thread to the one that accepts."""

    spin_s = 0.0

    def __init__(self, answer: Answer) -> None:
        """``answer`` chooses this end's hello; it is called under a lock, one peer at a time."""
        self._answer = answer
        self._lock = threading.Lock()
        self._links: deque[Link] = deque()
        self._refused: deque[AntiphonError] = deque(maxlen=_MAX_REFUSALS)
        self._error: Exception | None = None
        self._closed = False
        self._wakeup = Wakeup()
        self._address = ""
        self._stop: Callable[[], None] = lambda: None

    def open(self, address: str, stop: Callable[[], None]) -> None:
        """Peers find us at ``address``; ``stop`` ends the arriving, and is called by ``close``."""
        self._address = address
        self._stop = stop

    @property
    def address(self) -> str:
        """What peers connect to."""
        return self._address

    def answer(self, theirs: Hello) -> Hello:
        """This end's hello for ``theirs``; the layouts are not yet compared. Raises an AntiphonError to send back."""
        with self._lock:
            if self._closed:
                raise Unavailable("the listener is closed")
            try:
                return self._answer(theirs)
            except AntiphonError:
                raise
            except Exception as error:
                self.fail(error)
                raise Unavailable(f"the listener failed to answer: {type(error).__name__}") from error

    def refuse(self, error: AntiphonError) -> None:
        """Note a peer that was turned away, for ``refused`` to tell."""
        self._refused.append(kept(error))

    def arrive(self, link: Link) -> None:
        """Leave a link for ``accept``; it is closed at once if nobody will come for it."""
        with self._lock:
            if not self._closed:
                self._links.append(link)
                self._wakeup.ring()
                return
        link.close()

    def fail(self, error: Exception) -> None:
        """Leave the first unexpected error for ``accept`` to raise."""
        if self._error is None:
            self._error = error
        self._wakeup.ring()

    def accept(self) -> Link | None:
        """The next link, or None. Raises the error left by ``fail``, once."""
        self._wakeup.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._links.popleft() if self._links else None

    def refused(self) -> AntiphonError | None:
        """Why the next peer was turned away, or None."""
        return self._refused.popleft() if self._refused else None

    def pending(self) -> bool:
        """True when ``accept`` has a link or an error."""
        return bool(self._links or self._error)

    def park(self) -> Sequence[int]:
        """The wakeup that every arrival rings."""
        return (self._wakeup.fd,) if self._wakeup.fd >= 0 else ()

    def unpark(self, *, woken: bool) -> None:
        """Silence the wakeup: what arrived is known without it."""
        if woken:
            self._wakeup.clear()

    def close(self) -> None:
        """Stop accepting, and close the links nobody accepted; idempotent."""
        with self._lock:
            self._closed = True
            links = list(self._links)
            self._links.clear()
        stop, self._stop = self._stop, lambda: None
        stop()
        for link in links:
            link.close()
        self._wakeup.close()
