"""Who has to go where a gRPC door holds nearly as many connections as it can (control speed; a thread that looks at sockets).

    a look ─► /proc/self/fd ─► connections of this door ─► more than it likes to hold?
           ─► those without a running call, first those that never had one, of these the oldest, are shut down: gRPC sees their end

gRPC itself can only close who comes last, so that a crowd which is there first, and proves nothing, would keep everybody else out.
Whoever had proven himself and is idle comes again with his next call. Must not know: what is called, or by whom.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from antiphon.rpc.credentials import max_connections

_MANY_CALLERS: Final = 4096  # connections that had a call; those that are gone are forgotten at a look
_CALM_S: Final = 0.5  # between two looks
_CROWDED_S: Final = 0.01  # where a door holds more than half of what it may
_TCP_INFO_BYTES: Final = 64
_LAST_DATA_RECV: Final = struct.Struct("@52xI")  # of the kernel's tcp_info: milliseconds since the peer sent anything


Address = tuple[str, int]


class RunningCalls:
    """Calls that were begun, by their connection: it stays. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_calls: Counter[str] = Counter()
        self._callers: set[str] = set()

    @contextlib.contextmanager
    def of(self, peer: str) -> Iterator[None]:
        """One runs meanwhile; ``peer`` as gRPC names it."""
        self.begin(peer)
        try:
            yield
        finally:
            self.end(peer)

    def begin(self, peer: str) -> None:
        """One more."""
        with self._lock:
            self._num_calls[peer] += 1
            self._callers.add(peer)

    def end(self, peer: str) -> None:
        """One less."""
        with self._lock:
            self._num_calls[peer] -= 1
            if not self._num_calls[peer]:
                del self._num_calls[peer]

    @property
    def num_callers(self) -> int:
        """Connections that had a call and were not forgotten."""
        return len(self._callers)

    def keep(self, addresses: set[Address]) -> tuple[set[Address], set[Address]]:
        """Forget connections that are gone; where calls run, and where one ever did."""
        with self._lock:
            self._callers = {peer for peer in self._callers if peer in self._num_calls or _address(peer) in addresses}
            return {_address(peer) for peer in self._num_calls}, {_address(peer) for peer in self._callers}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Connection:
    fd: int
    inode: str  # of its socket: no other has it as long as this one is open
    peer: Address
    silent_ms: int


class Crowd:
    """The connections of one door, kept below what gRPC takes; looks until it is closed.

    Where a system has no /proc, gRPC's own bound is all there is.
    """

    def __init__(self, port: int, calls: RunningCalls) -> None:
        self._port = port
        self._calls = calls
        most = max_connections()
        self._enough, self._few = most * 3 // 4, most // 2
        self._seen: dict[str, int] = {}  # sockets' inodes, by the look that saw them first
        self._num_looks = 0
        self._is_closed = threading.Event()
        if os.path.isdir("/proc/self/fd"):
            threading.Thread(target=self._run, name=f"crowd-{port}", daemon=True).start()

    def close(self) -> None:
        """Look no more; idempotent, from any thread."""
        self._is_closed.set()

    def _run(self) -> None:
        pause_s = _CALM_S
        while not self._is_closed.wait(pause_s):
            pause_s = _CROWDED_S if self.look() > self._few else _CALM_S

    def look(self) -> int:
        """Shut down whoever has to go; how many connections stay."""
        self._num_looks += 1
        try:
            fds = os.listdir("/proc/self/fd")
        except OSError:  # no file is left to look with: the next look has one
            return self._few + 1
        if len(fds) < self._few and self._calls.num_callers < _MANY_CALLERS:
            self._seen.clear()
            return 0
        found = [connection for fd in fds if (connection := self._connection(int(fd))) is not None]
        self._seen = {each.inode: self._seen.get(each.inode, self._num_looks) for each in found}
        running, known = self._calls.keep({each.peer for each in found})
        if len(found) > self._enough:
            idle = [each for each in found if each.peer not in running]
            idle.sort(key=lambda each: (each.peer in known, self._seen[each.inode], -each.silent_ms))
            going = idle[: len(found) - self._few]
            for each in going:
                self._shut(each)
            return len(found) - len(going)
        return len(found)

    def _connection(self, fd: int) -> _Connection | None:
        """What this file is, if it is a connection that came to this door."""
        try:
            inode = os.readlink(f"/proc/self/fd/{fd}")
            if not inode.startswith("socket:"):
                return None
            with _borrowed(fd) as sock:
                if not self._is_ours(sock):
                    return None
                host, port = sock.getpeername()[:2]
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return None
        (silent_ms,) = _LAST_DATA_RECV.unpack_from(info)
        return _Connection(fd=fd, inode=inode, peer=(_plain(host), port), silent_ms=silent_ms)

    def _is_ours(self, sock: socket.socket) -> bool:
        return (
            sock.type == socket.SOCK_STREAM
            and sock.family in (socket.AF_INET, socket.AF_INET6)
            and sock.getsockname()[1] == self._port
            and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )

    def _shut(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            fd = os.dup(connection.fd)  # gRPC may close its own meanwhile, and the number be another connection's
            try:
                with _borrowed(fd) as sock:
                    host, port = sock.getpeername()[:2]
                    if self._is_ours(sock) and (_plain(host), port) == connection.peer:
                        sock.shutdown(socket.SHUT_RDWR)
            finally:
                os.close(fd)


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket to look at that is somebody else's to close. Raises OSError: it is none."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def _address(peer: str) -> Address:
    """ipv4:127.0.0.1:80 and ipv6:%5B::1%5D:80 as the kernel tells them; nowhere, where the connection had gone before its call."""
    host, _, port = peer.rpartition(":")
    return (_plain(unquote(host.partition(":")[2])), int(port)) if port.isdecimal() else ("", 0)


def _plain(host: str) -> str:
    """One spelling for an address, however it came."""
    return host.strip("[]").partition("%")[0].removeprefix("::ffff:")
