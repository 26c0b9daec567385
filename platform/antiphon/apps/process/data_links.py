"""Which transports a worker listens on and connects with, from the document's transport section (control speed).

Must not know: what links carry.
"""

from __future__ import annotations

from antiphon.core.document.spec import TransportName
from antiphon.core.errors import InvalidInput
from antiphon.transport.base import Answer, Hello, Link, Listener
from antiphon.transport.connect.choose import connect_auto, open_transport


def listen(name: TransportName, host: str, answer: Answer) -> Listener:
    """Accept links by the named transport; "auto" offers all that work here.

    Raises:
        InvalidInput: the transport joins workers of one process only.
        Unavailable: it does not work here.
    """
    if name == "loopback":
        raise InvalidInput("loopback joins workers of one process only; expected auto, shm, nixl or grpc", "spec.transport")
    return open_transport(name).listen(host, answer)


def connect(address: str, hello: Hello, timeout_s: float) -> Link:
    """Open a link to the best of a peer's comma-separated data addresses. Raises PeerLost, LayoutMismatch, Unavailable."""
    return connect_auto(address.split(","), hello, timeout_s)
