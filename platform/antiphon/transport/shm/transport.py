"""Links through shared memory on one node: slots in place, spin, then sleep (hot).

The connecting end makes an anonymous, sealed memory file and two wakeups, and passes all three over a unix socket, so nothing
has a name, nothing outlives the two processes, and whoever can't reach the socket can't use this transport:

    connecting                               listening
      proofs  ◄───────────────────────────►  proofs (connect.proof)
      hello ──────────────────────────────────►  answer, compare
      compare  ◄──────────────────────────  hello
      memory file, two wakeups ─────────────►  map
      open  ◄─────────────────────────────  ready

Where both hellos want slots in a card's memory, the first memory file has no slots, and the handle of a region of the connecting
end's card comes with it. A listening end that can't open that region says so, and all is done again with slots in the file:

    file without slots, two wakeups, handle ─►  open, map
      open, slots on a card  ◄────────────  ready            (or "host": once more as above)

The socket then stays open and silent: its end of file (or the peer's pidfd) is how a loss shows, to a sleeper at once and to
a poller within 10 ms. ``shm://<name>`` is an abstract socket (same network namespace: one machine, or containers of one
pod), ``shm:///directory/<name>`` a socket file (any processes that share the directory).
Must not know: what slots hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import mmap
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from antiphon.core.errors import AntiphonError, LayoutMismatch, PeerLost, Unavailable
from antiphon.device.shared import HANDLE_BYTES, SharedRegion, shared_memory
from antiphon.transport.base import Answer, Hello, Listener, Transport
from antiphon.transport.connect.acceptor import Acceptor
from antiphon.transport.connect.hello import (
    Greeting,
    check_layouts,
    encode_greeting,
    encode_refusal,
)
from antiphon.transport.connect.listener import QueuedListener
from antiphon.transport.connect.proof import PROOF_S, accept_proven, connect_proven
from antiphon.transport.liveness import PeerLiveness
from antiphon.transport.shm.ring import RingLink
from antiphon.transport.shm.segment import Segment
from antiphon.transport.wakeup import Wakeup

SCHEME = "shm://"
logger = logging.getLogger(__name__)

# Waking a sleeper costs 50 to 150 us on a virtual machine. A wait of up to SPIN_S pays nothing, a longer one a twentieth at most.
SPIN_S = 3e-3
_SOCKET_SUFFIX = ".antiphon"
_GREETING_S = 5.0
_READY, _HOST = b"R", b"H"
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ShmTransport(Transport):
    """Links between two processes of one node."""

    name = "shm"

    def __init__(self, *, directory: Path | None = None, spin_s: float = SPIN_S, native: bool = True) -> None:
        """Configure.

        Args:
            directory: Where listeners put their socket file; None uses abstract sockets.
            spin_s: Seconds to spin before a sleep; longer than the peer computes a layer, shorter than it is idle.
            native: False keeps to the Python control channel.
        """
        self._directory = directory
        self._spin_s = spin_s
        self._native = native

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links from this node, whatever ``host``. Raises Unavailable."""
        _require_linux()
        name = f"antiphon-{secrets.token_hex(8)}"
        path = f"\0{name}" if self._directory is None else str(self._directory / (name + _SOCKET_SUFFIX))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
                _sweep(self._directory)
            sock.bind(path)
        except OSError as error:
            sock.close()
            raise Unavailable(f"no shared memory: can't listen on {path!r}: {error}") from error
        listener = QueuedListener(answer)
        acceptor = Acceptor(sock, functools.partial(self._greet, listener), listener.arrive)

        def stop() -> None:
            acceptor.close()
            if self._directory is not None:
                Path(path).unlink(missing_ok=True)

        listener.open(SCHEME + (name if self._directory is None else path), stop)
        return listener

    def connect(self, address: str, hello: Hello, timeout_s: float) -> RingLink:
        """Open a link. Raises Unavailable, LayoutMismatch, PeerLost."""
        _require_linux()
        if not address.startswith(SCHEME):
            raise Unavailable(f"{address} is no {SCHEME} address")
        name = address.removeprefix(SCHEME)
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                sock.settimeout(timeout_s)
                sock.connect(name if name.startswith("/") else f"\0{name}")
            except OSError as error:
                raise Unavailable(f"no shared memory with {address}: {error}") from error
            _require_same_user(sock, address)
            proven = connect_proven(sock, address, deadline)
            proven.send(encode_greeting(Greeting(hello=hello)), address, deadline)
            theirs = proven.receive(address, deadline).hello
            check_layouts(hello, theirs)
            wakeups = undo.enter_context(Wakeup()), undo.enter_context(Wakeup())
            region, handle = _make_region(hello, theirs, address)
            memory = None
            if region is not None:
                undo.callback(region.handed_over)
                memory = _offer(sock, Segment.of(hello.layout, connecting=True, apart=True), wakeups, address, handle)
                region.handed_over()
            if memory is None:
                region = None
                memory = _offer(sock, Segment.of(hello.layout, connecting=True), wakeups, address)
                assert memory is not None  # without a region it is taken, or the offer raised
            link = self._open(hello, theirs, memory, sock, wakeups, connecting=True, region=region)
            undo.pop_all()
        return link

    def _open(
        self,
        mine: Hello,
        theirs: Hello,
        memory: mmap.mmap,
        sock: socket.socket,
        wakeups: tuple[Wakeup, Wakeup],
        *,
        connecting: bool,
        region: SharedRegion | None,
    ) -> RingLink:
        return RingLink(
            mine,
            theirs,
            memory,
            PeerLiveness(sock, _peer_pid(sock)),
            wakeups,
            connecting=connecting,
            spin_s=self._spin_s,
            native=self._native,
            region=region,
        )

    def _greet(self, listener: QueuedListener, sock: socket.socket, proven_to: Callable[[], None]) -> RingLink | None:
        """Whatever a peer does before its link is open, it is turned away for it; nothing of it reaches the listener's owner."""
        deadline = time.monotonic() + _GREETING_S
        peer, proven = "of a shared-memory link", None
        with contextlib.ExitStack() as undo:
            undo.enter_context(sock)
            try:
                _require_same_user(sock, peer)
                proven = accept_proven(sock, peer, time.monotonic() + PROOF_S)
                proven_to()
                theirs = proven.receive(peer, deadline).hello
                peer = theirs.worker_id
                mine = listener.answer(theirs)
                proven.send(encode_greeting(Greeting(hello=mine)), peer, deadline)
                check_layouts(mine, theirs)
            except AntiphonError as error:
                listener.refuse(error)
                if proven is not None and not isinstance(error, LayoutMismatch):
                    with contextlib.suppress(PeerLost):
                        proven.send(encode_refusal(error), peer, deadline)
                return None
            except Exception as error:
                logger.warning("%s is turned away", peer, exc_info=error)
                listener.refuse(Unavailable(f"no shared memory with {peer}: {type(error).__name__}: {error}"))
                return None
            try:
                link = self._take_memory(mine, theirs, sock, undo)
                sock.sendall(_READY)
            except Exception as error:  # noqa: BLE001 - refused, and told
                listener.refuse(Unavailable(f"no shared memory with {peer}: {error}"))
                return None
            undo.pop_all()
        return link

    def _take_memory(self, mine: Hello, theirs: Hello, sock: socket.socket, undo: contextlib.ExitStack) -> RingLink:
        data, handles, _, _ = socket.recv_fds(sock, 1 + HANDLE_BYTES, 3)
        if len(handles) != 3 or data[:1] != _READY or len(data) not in (1, 1 + HANDLE_BYTES):
            for handle in handles:
                os.close(handle)
            raise Unavailable("it passed no memory")
        region = None
        if len(data) > 1 and (region := _open_region(mine, theirs, data[1:])) is None:
            for handle in handles:
                os.close(handle)
            sock.sendall(_HOST)
            return self._take_memory(mine, replace(theirs, layout=replace(theirs.layout, memory="")), sock, undo)
        peers, own = undo.enter_context(Wakeup(handles[1])), undo.enter_context(Wakeup(handles[2]))
        try:
            memory = _map_checked(handles[0], Segment.of(mine.layout, connecting=False, apart=region is not None))
        finally:
            os.close(handles[0])
        return self._open(mine, theirs, memory, sock, (own, peers), connecting=False, region=region)


def _make_region(mine: Hello, theirs: Hello, address: str) -> tuple[SharedRegion | None, bytes]:
    """A region for the slots and its handle, where both ends want them on a card; (None, b"") where they go to host memory."""
    if not mine.layout.memory or mine.layout.memory != theirs.layout.memory:
        return None, b""
    try:
        return shared_memory(mine.layout.memory).make(Segment.of(mine.layout, connecting=True, apart=True).region_bytes)
    except Unavailable as error:
        logger.warning("no card memory for a link with %s: rows go through the host's: %s", address, error)
        return None, b""


def _open_region(mine: Hello, theirs: Hello, handle: bytes) -> SharedRegion | None:
    """The connecting end's region; None where it can't be opened. Raises Unavailable: nobody asked for one."""
    if not mine.layout.memory or mine.layout.memory != theirs.layout.memory:
        raise Unavailable("it passed a card's memory, which was not agreed on")
    try:
        return shared_memory(mine.layout.memory).open(handle, Segment.of(mine.layout, connecting=False, apart=True).region_bytes)
    except Unavailable as error:
        logger.warning("%s's card memory can't be opened: rows go through the host's: %s", theirs.worker_id, error)
        return None


def _offer(
    sock: socket.socket, segment: Segment, wakeups: tuple[Wakeup, Wakeup], address: str, region: bytes = b""
) -> mmap.mmap | None:
    """Make a memory file and pass it; our map of it, None where the peer can't open the region. Raises Unavailable, PeerLost."""
    handle = _make_memory(segment, address)
    try:
        socket.send_fds(sock, [_READY + region], [handle, *(wakeup.fd for wakeup in wakeups)])
        reply = sock.recv(1)
        if reply == _READY:
            return _map(handle, segment)
    except OSError as error:
        raise PeerLost(address, f"it took no memory: {error}") from error
    finally:
        os.close(handle)
    if region and reply == _HOST:
        return None
    raise Unavailable(f"no shared memory with {address}: it could not map ours")


def _make_memory(segment: Segment, address: str) -> int:
    try:
        handle = os.memfd_create("antiphon-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(handle, 0, segment.num_bytes)  # all of it now, rather than a bus error later
            os.pwrite(handle, segment.prefix(), 0)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(handle)
            raise
    except OSError as error:
        raise Unavailable(f"no shared memory with {address}: {segment.num_bytes} bytes: {error}") from error
    return handle


def _map(handle: int, segment: Segment) -> mmap.mmap:
    return mmap.mmap(handle, segment.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _map_checked(handle: int, segment: Segment) -> mmap.mmap:
    # A peer that could shrink the file under our mapping could kill this process.
    if fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise Unavailable("its memory can still change size")
    if os.fstat(handle).st_size != segment.num_bytes:
        raise Unavailable(f"its memory has {os.fstat(handle).st_size} bytes instead of {segment.num_bytes}")
    memory = _map(handle, segment)
    if memory[: len(segment.prefix())] != segment.prefix():
        raise Unavailable("its memory is laid out differently")
    return memory


def _require_linux() -> None:
    if sys.platform != "linux":
        raise Unavailable("no shared memory: it needs Linux")


def _peer_credentials(sock: socket.socket) -> tuple[int, int]:
    pid, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user


def _peer_pid(sock: socket.socket) -> int | None:
    pid, _ = _peer_credentials(sock)
    return None if pid == os.getpid() else pid


def _require_same_user(sock: socket.socket, peer: str) -> None:
    _, user = _peer_credentials(sock)
    if user not in (os.geteuid(), 0):
        raise Unavailable(f"no shared memory with {peer}: it runs as user {user}")


def _sweep(directory: Path) -> None:
    """Remove socket files whose listener died without unlinking them."""
    for path in directory.glob(f"antiphon-*{_SOCKET_SUFFIX}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue
