"""What a peer that lies does to a link: CorruptMessage once, PeerLost from then on, PeerLost for the liar."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from antiphon.core.errors import CorruptMessage, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.rpc.raw_stream import open_stream
from antiphon.transport.base import HEADER_BYTES, Hello, Link, LinkLayout, Listener
from antiphon.transport.connect.choose import connect_auto
from antiphon.transport.connect.hello import Greeting, decode_greeting, encode_greeting
from antiphon.transport.connect.proof import connect_proven
from antiphon.transport.credits import CREDIT, DATA, PREFIX
from antiphon.transport.grpc import GrpcTransport
from antiphon.transport.shm.ring import RingLink
from antiphon.transport.shm.transport import ShmTransport

HEADER = bytes(HEADER_BYTES)
LAYOUT = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=())


def hello(worker: str) -> Hello:
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(1), layout=LAYOUT)


def eventually(link_or_none: Callable[[], Link | None]) -> Link:
    deadline = time.monotonic() + 10
    while (link := link_or_none()) is None:
        assert time.monotonic() < deadline
    return link


def poll_until_raised(call: Callable[[], object]) -> Exception:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            call()
        except (CorruptMessage, PeerLost) as error:
            return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"garbage",
        PREFIX.pack(DATA, 0, 1, 4) + HEADER + b"abcd",
        PREFIX.pack(DATA, 0, 0, 5) + HEADER + b"abcd",
        PREFIX.pack(DATA, 0, 0, 100) + HEADER + bytes(100),
    ],
    ids=["empty", "garbage", "out of sequence", "short payload", "longer than a slot"],
)
def test_a_damaged_grpc_frame_is_found_and_ends_the_link(frame: bytes) -> None:
    listener = GrpcTransport().listen("127.0.0.1", lambda _: hello("b"))
    stream = open_stream(listener.address.removeprefix("grpc://"), max_receive_bytes=1 << 20)
    stream.send(encode_greeting(Greeting(hello=hello("liar"))))
    decode_greeting(stream.receive(10.0), "b")
    link = eventually(listener.accept)
    stream.send(frame)
    error = poll_until_raised(link.poll)
    assert isinstance(error, CorruptMessage)
    assert error.peer == "liar"
    for call in (link.poll, link.acquire):
        with pytest.raises(PeerLost, match="corrupt"):
            call()
    assert isinstance(poll_until_raised(lambda: stream.receive(10.0)), PeerLost)
    stream.close()
    link.close()
    listener.close()


def test_a_credit_for_a_slot_that_was_never_sent_is_found_over_grpc() -> None:
    listener = GrpcTransport().listen("127.0.0.1", lambda _: hello("b"))
    stream = open_stream(listener.address.removeprefix("grpc://"), max_receive_bytes=1 << 20)
    stream.send(encode_greeting(Greeting(hello=hello("liar"))))
    decode_greeting(stream.receive(10.0), "b")
    link = eventually(listener.accept)
    stream.send(PREFIX.pack(CREDIT, 1, 0, 0))
    assert isinstance(poll_until_raised(link.acquire), CorruptMessage)
    stream.close()
    link.close()
    listener.close()


@pytest.mark.parametrize("native", [True, False])
def test_a_ring_entry_longer_than_its_slot_is_found_and_ends_the_link(native: bool) -> None:
    listener = ShmTransport(native=native).listen("", lambda _: hello("b"))
    near = ShmTransport(native=native).connect(listener.address, hello("liar"), 10.0)
    far = eventually(listener.accept)
    assert isinstance(near, RingLink)
    near._channel.publish(0, HEADER, 65)
    error = poll_until_raised(far.poll)
    assert isinstance(error, CorruptMessage)
    assert error.peer == "liar"
    with pytest.raises(PeerLost, match="corrupt"):
        far.poll()
    assert isinstance(poll_until_raised(near.poll), PeerLost)
    near.close()
    listener.close()


def test_a_ring_slot_published_twice_is_found() -> None:
    listener = ShmTransport().listen("", lambda _: hello("b"))
    near = ShmTransport().connect(listener.address, hello("liar"), 10.0)
    far = eventually(listener.accept)
    near._channel.publish(0, HEADER, 1)
    near._channel.publish(0, HEADER, 1)
    assert far.poll() is not None
    with pytest.raises(CorruptMessage):
        far.poll()
    near.close()
    listener.close()


def connect_raw(listener: Listener) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect("\0" + listener.address.removeprefix("shm://"))
    return sock


def test_strangers_on_the_socket_are_turned_away_and_the_listener_goes_on() -> None:
    listener = ShmTransport().listen("", lambda _: hello("b"))
    for said in (b"GET / HTTP/1.1\r\n\r\n" * 4, struct.pack("<IHHII", 0x48544E41, 1, 1, 10, 0) + b"0123456789", b""):
        with connect_raw(listener) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # it hung up with our words unread
                while sock.recv(4096):
                    pass
    link = ShmTransport().connect(listener.address, hello("a"), 10.0)
    eventually(listener.accept).close()
    link.close()
    listener.close()


def test_memory_that_can_still_shrink_is_not_mapped() -> None:
    listener = ShmTransport().listen("", lambda _: hello("b"))
    with connect_raw(listener) as sock:
        deadline = time.monotonic() + 10
        proven = connect_proven(sock, "b", deadline)
        proven.send(encode_greeting(Greeting(hello=hello("liar"))), "b", deadline)
        proven.receive("b", deadline)
        memory = os.memfd_create("not-sealed")
        os.ftruncate(memory, 1 << 20)
        socket.send_fds(sock, [b"R"], [memory, memory, memory])
        os.close(memory)
        assert sock.recv(1) == b""
    deadline = time.monotonic() + 10
    while (refused := listener.refused()) is None:
        assert time.monotonic() < deadline
    assert isinstance(refused, Unavailable)
    assert "change size" in str(refused)
    listener.close()


def test_a_door_of_a_process_that_may_open_no_more_files_rests_and_opens_again() -> None:
    """accept() fails at once while the peer waits in the backlog: asking again at once would take a whole processor."""
    script = """
import os, resource, socket, threading, time
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.shm.transport import ShmTransport
layout = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=())
hello = lambda name: Hello(worker_id=WorkerId(name), epoch=Epoch(1), layout=layout)
listener = ShmTransport().listen("", lambda _: hello("b"))
waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
waiting.connect("\\0" + listener.address.removeprefix("shm://"))
before = time.process_time()
time.sleep(1.0)
print("rests", time.process_time() - before < 0.3)
for fd in held:
    os.close(fd)
waiting.close()
link = ShmTransport().connect(listener.address, hello("a"), 10.0)
print("opens", link.peer)
link.close()
listener.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["rests", "True", "opens", "b"], done.stdout + done.stderr


def test_memory_that_can_not_be_had_ends_the_attempt_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a full /dev/shm or a limit of the container: another transport takes its place."""

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    listener = ShmTransport().listen("", lambda _: hello("b"))
    with pytest.raises(Unavailable, match="No space left on device"):
        ShmTransport().connect(listener.address, hello("a"), 10.0)
    other = GrpcTransport().listen("127.0.0.1", lambda _: hello("b"))
    link = connect_auto([listener.address, other.address], hello("a"), 10.0)
    assert link.peer == "b"
    eventually(other.accept).close()
    link.close()
    listener.close()
    other.close()
