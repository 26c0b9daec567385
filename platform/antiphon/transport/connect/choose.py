"""Chooses a transport by opening it: shared memory, else NIXL, else gRPC (control).

A worker listens on everything that works for it; its address lists all of them, comma-separated. A peer tries them in the order of
preference, and the first that opens is the link. Host names are never compared: only opening tells.
Must not know: what links carry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable
from antiphon.transport.base import Answer, Hello, Link, Listener, Transport
from antiphon.transport.grpc import GrpcTransport
from antiphon.transport.loopback import LoopbackTransport
from antiphon.transport.nixl.transport import NixlTransport
from antiphon.transport.shm.transport import ShmTransport

PREFERENCE = ("shm", "nixl", "grpc")
_MAKERS: dict[str, Callable[[], Transport]] = {
    "loopback": LoopbackTransport,
    "shm": ShmTransport,
    "nixl": NixlTransport,
    "grpc": GrpcTransport,
}


def open_transport(name: str) -> Transport:
    """The transport called ``name``; "auto" is all of them by preference. Raises InvalidInput."""
    if name == "auto":
        return AutoTransport()
    maker = _MAKERS.get(name)
    if maker is None:
        raise InvalidInput(f"no transport is called {name!r}; expected auto, {', '.join(_MAKERS)}", "transport")
    return maker()


def connect_auto(addresses: Sequence[str], hello: Hello, timeout_s: float) -> Link:
    """Open a link to the first of one peer's ``addresses`` that opens, by preference.

    Raises:
        Unavailable: none opened; the message has each one's reason.
        LayoutMismatch: the peer was reached and disagrees.
    """
    deadline = time.monotonic() + timeout_s
    reasons = []
    for name in PREFERENCE:
        for address in addresses:
            if not address.startswith(f"{name}://"):
                continue
            try:
                return open_transport(name).connect(address, hello, max(0.001, deadline - time.monotonic()))
            except Unavailable as error:
                reasons.append(str(error))
    raise Unavailable("; ".join(reasons) or f"no known transport among {', '.join(addresses) or 'no addresses'}")


def listen_all(names: Sequence[str], host: str, answer: Answer) -> Listener:
    """Accept links by each of ``names`` that works here. Raises Unavailable when none does."""
    listeners: list[Listener] = []
    reasons = []
    for name in names:
        try:
            listeners.append(open_transport(name).listen(host, answer))
        except Unavailable as error:
            reasons.append(str(error))
    if not listeners:
        raise Unavailable("; ".join(reasons) or "no transport was asked for")
    return _ManyListeners(listeners)


class AutoTransport(Transport):
    """All transports between processes as one; an address is a comma-separated list."""

    name = "auto"

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links by every transport that works here."""
        return listen_all(PREFERENCE, host, answer)

    def connect(self, address: str, hello: Hello, timeout_s: float) -> Link:
        """Open a link by the best of the listed addresses. Raises Unavailable, LayoutMismatch."""
        return connect_auto(address.split(","), hello, timeout_s)


class _ManyListeners(Listener):
    spin_s = 0.0

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)

    @property
    def address(self) -> str:
        return ",".join(listener.address for listener in self._listeners)

    def accept(self) -> Link | None:
        for listener in self._listeners:
            if (link := listener.accept()) is not None:
                return link
        return None

    def refused(self) -> AntiphonError | None:
        for listener in self._listeners:
            if (error := listener.refused()) is not None:
                return error
        return None

    def pending(self) -> bool:
        return any(listener.pending() for listener in self._listeners)

    def park(self) -> Sequence[int]:
        return [fd for listener in self._listeners for fd in listener.park()]

    def unpark(self, *, woken: bool) -> None:
        for listener in self._listeners:
            listener.unpark(woken=woken)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
