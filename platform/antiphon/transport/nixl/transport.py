"""Links by NIXL over UCX: RDMA where there is a network card for it, else shared memory or TCP (control; link.py is hot).

    connecting                                    listening
      proofs (connect.proof)  ◄────────────────►  proofs
      hello, boot id  ─────────────────────────────►  answer, compare, make an agent
      compare, make an agent  ◄──────────────────  hello, boot id, slots' address, NIXL metadata
      slots' address, NIXL metadata ───────────────►  connect
      a few writes each way, then ready each way ◄────►

over a TCP socket that stays open, for its end of file is the loss of the peer. Ends with one boot id are on one machine, where UCX
uses shared memory only if its error handling is off. Must not know: what slots hold.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from antiphon.core.errors import AntiphonError, CorruptMessage, LayoutMismatch, PeerLost, Unavailable
from antiphon.transport.base import Answer, Hello, Link, Listener, Transport
from antiphon.transport.connect.acceptor import Acceptor
from antiphon.transport.connect.address import join_host, split_host
from antiphon.transport.connect.hello import (
    Greeting,
    check_layouts,
    encode_greeting,
    encode_refusal,
)
from antiphon.transport.connect.listener import QueuedListener
from antiphon.transport.connect.proof import PROOF_S, accept_proven, connect_proven
from antiphon.transport.liveness import PeerLiveness
from antiphon.transport.nixl.agent import Agent, require_nixl
from antiphon.transport.nixl.link import NixlLink

SCHEME = "nixl://"
_GREETING_S = 10.0
_READY = b"R"
_WARM_UP_NAP_S = 100e-6
logger = logging.getLogger(__name__)
_TERMS = struct.Struct("<16sQI")  # boot id, address of this end's receiving slots, their device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What an end says about itself: where its slots are, and how its agent is reached."""

    boot_id: bytes
    address: int = 0
    device: int = 0
    metadata: bytes = b""

    def encode(self) -> bytes:
        return _TERMS.pack(self.boot_id, self.address, self.device) + self.metadata

    @classmethod
    def decode(cls, data: bytes, peer: str) -> _Terms:
        if len(data) < _TERMS.size:
            raise CorruptMessage(peer, f"NIXL terms of {len(data)} bytes")
        boot_id, address, device = _TERMS.unpack_from(data)
        return cls(boot_id=boot_id, address=address, device=device, metadata=data[_TERMS.size :])


class _End:
    """An end under construction: its agent and its registered slots."""

    def __init__(self, hello: Hello, device: torch.device, *, survives_peer_errors: bool) -> None:
        layout = hello.layout
        self.hello = hello
        self.agent = Agent(survives_peer_errors=survives_peer_errors)
        self.send = torch.zeros(layout.num_slots, layout.send_slot_bytes, dtype=torch.uint8, device=device)
        self.recv = torch.zeros(layout.num_slots, layout.recv_slot_bytes, dtype=torch.uint8, device=device)
        self.agent.register(self.send)
        self.agent.register(self.recv)

    def terms(self) -> _Terms:
        return _Terms(
            boot_id=_boot_id(),
            address=self.recv.data_ptr() if self.recv.numel() else 0,
            device=self.recv.device.index or 0,
            metadata=self.agent.metadata(),
        )

    def link(self, theirs: Hello, terms: _Terms, sock: socket.socket) -> NixlLink:
        self.agent.connect(terms.metadata)
        return NixlLink(self.hello, theirs, self.agent, self.send, self.recv, terms.address, terms.device, PeerLiveness(sock))


class NixlTransport(Transport):
    """Links between machines with a fast network, or between processes of one machine."""

    name = "nixl"

    def __init__(
        self,
        *,
        device: str = "cpu",
        error_handling: Literal["auto", "none", "peer"] = "auto",
    ) -> None:
        """Configure.

        Args:
            device: Where slots lie: cpu, or a CUDA device for transfers between GPUs' memories.
            error_handling: UCX's; auto is none on one machine and peer between machines. Both ends must have the same.
        """
        self._device = torch.device(device)
        self._error_handling = error_handling

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links on ``host`` (any free port) or ``host:port``. Raises Unavailable, also where NIXL is not installed."""
        require_nixl()
        name, port = split_host(host)
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((name, port))
        except OSError as error:
            sock.close()
            raise Unavailable(f"can't listen on {join_host(name, port)}: {error}") from error
        listener = QueuedListener(answer)
        acceptor = Acceptor(sock, functools.partial(self._greet, listener), listener.arrive)
        listener.open(SCHEME + join_host(name, sock.getsockname()[1]), acceptor.close)
        return listener

    def connect(self, address: str, hello: Hello, timeout_s: float) -> NixlLink:
        """Open a link. Raises Unavailable, LayoutMismatch, PeerLost."""
        if not address.startswith(SCHEME):
            raise Unavailable(f"{address} is no {SCHEME} address")
        require_nixl()
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as undo:
            try:
                sock = undo.enter_context(socket.create_connection(split_host(address.removeprefix(SCHEME)), timeout_s))
            except OSError as error:
                raise Unavailable(f"nobody answers at {address}: {error}") from error
            _watch_connection(sock)
            proven = connect_proven(sock, address, deadline)
            proven.send(_greeting(hello, _Terms(boot_id=_boot_id())), address, deadline)
            greeting = proven.receive(address, deadline)
            theirs = greeting.hello
            check_layouts(hello, theirs)
            terms = _Terms.decode(greeting.attachment, address)
            end = _End(hello, self._device, survives_peer_errors=self._survives(terms))
            undo.callback(end.agent.close)
            proven.send(_greeting(hello, end.terms()), address, deadline)
            link = end.link(theirs, terms, sock)
            _warm_up(link, sock, address, deadline)
            undo.pop_all()
        return link

    def _greet(self, listener: QueuedListener, sock: socket.socket, proven_to: Callable[[], None]) -> Link | None:
        """Whatever a peer does before its link is open, it is turned away for it; nothing of it reaches the listener's owner."""
        deadline = time.monotonic() + _GREETING_S
        peer, proven = "of a NIXL link", None
        with contextlib.ExitStack() as undo:
            undo.enter_context(sock)
            try:
                _watch_connection(sock)
                proven = accept_proven(sock, peer, time.monotonic() + PROOF_S)
                proven_to()
                greeting = proven.receive(peer, deadline)
                theirs = greeting.hello
                peer = theirs.worker_id
                first = _Terms.decode(greeting.attachment, peer)
                mine = listener.answer(theirs)
                try:
                    check_layouts(mine, theirs)
                except LayoutMismatch as error:
                    listener.refuse(error)
                    proven.send(_greeting(mine, _Terms(boot_id=_boot_id())), peer, deadline)
                    return None
                end = _End(mine, self._device, survives_peer_errors=self._survives(first))
                undo.callback(end.agent.close)
                proven.send(_greeting(mine, end.terms()), peer, deadline)
                terms = _Terms.decode(proven.receive(peer, deadline).attachment, peer)
                link = end.link(theirs, terms, sock)
                _warm_up(link, sock, peer, deadline)
            except AntiphonError as error:
                listener.refuse(error)
                if proven is not None:
                    with contextlib.suppress(PeerLost):
                        proven.send(encode_refusal(error), peer, deadline)
                return None
            except Exception as error:
                logger.warning("%s is turned away", peer, exc_info=error)
                listener.refuse(Unavailable(f"no NIXL link with {peer}: {type(error).__name__}: {error}"))
                return None
            undo.pop_all()
        return link

    def _survives(self, terms: _Terms) -> bool:
        if self._error_handling == "auto":
            return terms.boot_id != _boot_id()
        return self._error_handling == "peer"


def _greeting(hello: Hello, terms: _Terms) -> bytes:
    return encode_greeting(Greeting(hello=hello, attachment=terms.encode()))


def _warm_up(link: NixlLink, sock: socket.socket, peer: str, deadline: float) -> None:
    """Push writes through in each direction, so that UCX's connection is up before anybody counts on it."""
    sock.setblocking(False)
    told = ready = False
    while not (told and ready):
        if time.monotonic() > deadline:
            raise PeerLost(peer, "its NIXL agent did not answer in time")
        if link.warm_up() and not told:
            told = True
            with contextlib.suppress(OSError):
                sock.send(_READY)
        try:
            data = sock.recv(1)
        except BlockingIOError:
            time.sleep(_WARM_UP_NAP_S)
            continue
        except OSError as error:
            raise PeerLost(peer, f"it broke off: {error}") from error
        if data != _READY:
            raise Unavailable(f"no NIXL link with {peer}: it could not connect its agent")
        ready = True


def _boot_id() -> bytes:
    try:
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


def _watch_connection(sock: socket.socket) -> None:
    """Make a silent network, too, show as a broken connection, within about 5 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 5000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
