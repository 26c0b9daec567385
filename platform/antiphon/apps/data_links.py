"""Which transports a worker listens on and connects with, from the document's transport section (control speed).

Must not know: what links carry.
"""

from __future__ import annotations

from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.spec import TransportName
from antiphon.transport.base import Answer, Hello, Link, Listener
from antiphon.transport.grpc import GrpcTransport


def listen(name: TransportName, host: str, answer: Answer) -> Listener:
    """Accept links by the named transport; "auto" offers all that work here."""
    if name in ("auto", "grpc"):
        return GrpcTransport().listen(host, answer)
    raise InvalidInput(f"transport {name!r} joins workers of one process only; expected auto or grpc", "spec.transport")


def connect(address: str, hello: Hello, timeout_s: float) -> Link:
    """Open a link to a peer's data address. Raises PeerLost, LayoutMismatch, Unavailable."""
    for part in address.split(","):
        if part.startswith("grpc://"):
            return GrpcTransport().connect(part, hello, timeout_s)
    raise Unavailable(f"no transport for {address!r}")
