"""Nobody is heard on a stream socket before proving to be a part of the deployment, and nothing said is changed unseen."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from antiphon.core.errors import AntiphonError, CorruptMessage, LayoutMismatch, PeerLost, Unauthenticated, Unavailable
from antiphon.core.identity import Identity, new_key
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.connect.hello import Greeting, encode_greeting
from antiphon.transport.connect.proof import ProvenSocket, accept_proven, connect_proven

OURS, OTHERS = new_key(), new_key()
US = Identity.parse(OURS)
GREETING = Greeting(
    hello=Hello(
        worker_id=WorkerId("d/attention/0"),
        epoch=Epoch(1),
        layout=LinkLayout(channel="afd", num_slots=2, send_slot_bytes=8, recv_slot_bytes=8, fields=(("model", "m"),)),
    ),
    attachment=b"descriptors",
)


def soon() -> float:
    return time.monotonic() + 10


class Pair:
    """Two ends of a socket, the listening one answered in a thread."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.found: ProvenSocket | AntiphonError | None = None
        self._thread = threading.Thread(target=lambda: None)

    def listen(self, identity: Identity = US) -> None:
        def answer() -> None:
            try:
                self.found = accept_proven(self.far, "stranger", soon(), identity)
            except AntiphonError as error:
                self.found = error
                self.far.close()

        self._thread = threading.Thread(target=answer)
        self._thread.start()

    def outcome(self) -> ProvenSocket | AntiphonError | None:
        self._thread.join(20)
        return self.found


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.near.close()
    made.far.close()


def test_parts_of_one_deployment_hear_each_other(pair: Pair) -> None:
    pair.listen()
    near = connect_proven(pair.near, "us", soon(), Identity.parse(OURS))
    far = pair.outcome()
    assert isinstance(far, ProvenSocket)
    for _ in range(2):
        near.send(encode_greeting(GREETING), "us", soon())
        assert far.receive("us", soon()) == GREETING
        far.send(encode_greeting(replace(GREETING, attachment=b"")), "us", soon())
        assert near.receive("us", soon()) == replace(GREETING, attachment=b"")


def test_a_part_of_another_deployment_is_no_part_of_ours_at_either_end(pair: Pair) -> None:
    pair.listen()
    with pytest.raises((Unavailable, PeerLost)):
        connect_proven(pair.near, "us", soon(), Identity.parse(OTHERS))
    assert isinstance(pair.outcome(), Unauthenticated)


def test_a_listener_without_the_key_is_told_nothing(pair: Pair) -> None:
    def pretend() -> None:
        opening = pair.far.recv(4096)
        pair.far.sendall(opening[:8] + os.urandom(32) + os.urandom(32))

    threading.Thread(target=pretend).start()
    with pytest.raises(Unavailable, match="no part of this deployment"):
        connect_proven(pair.near, "us", soon(), US)
    pair.far.settimeout(0.1)
    with pytest.raises((TimeoutError, BlockingIOError)):
        pair.far.recv(1)


def test_what_was_heard_on_another_link_opens_none(pair: Pair) -> None:
    heard: list[bytes] = []
    relay_near, relay_far = socket.socketpair()
    pair.listen()

    def relay() -> None:
        for source, to in ((relay_far, pair.near), (pair.near, relay_far), (relay_far, pair.near)):
            data = source.recv(4096)
            heard.append(data)
            to.sendall(data)

    thread = threading.Thread(target=relay)
    thread.start()
    connect_proven(relay_near, "us", soon(), US)
    thread.join()
    assert isinstance(pair.outcome(), ProvenSocket)
    again = Pair()
    again.listen()
    again.near.sendall(heard[0])
    again.near.recv(4096)
    again.near.sendall(heard[2])
    assert isinstance(again.outcome(), Unauthenticated)


def test_its_own_proof_turned_round_opens_none(pair: Pair) -> None:
    other = Pair()
    pair.listen()
    other.listen()
    # The stranger passes the challenge of one listener to another, and its proof back.
    head = struct.pack("<IHH8s", 0x48544E41, 2, 0, US.key_id())
    pair.near.sendall(head + bytes(32))
    nonce = pair.near.recv(4096)[8:40]
    other.near.sendall(head + nonce)
    proof = other.near.recv(4096)[40:]
    pair.near.sendall(proof)
    assert isinstance(pair.outcome(), Unauthenticated)
    other.near.close()
    other.outcome()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"[" * 100_000, CorruptMessage),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, CorruptMessage),
        (b"ANTH" + b"\x01\x00" + bytes(60), LayoutMismatch),
        (b"", PeerLost),
        (b"ANTH", PeerLost),
    ],
)
def test_strangers_are_read_no_further_than_their_opening(pair: Pair, said: bytes, error: type[AntiphonError]) -> None:
    pair.listen()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have read its opening and closed by now
        pair.near.sendall(said)
        pair.near.shutdown(socket.SHUT_WR)
    assert isinstance(pair.outcome(), error)


def test_a_silent_stranger_is_dropped_in_time(pair: Pair) -> None:
    with pytest.raises(PeerLost):
        accept_proven(pair.far, "stranger", time.monotonic() + 0.05, US)


@pytest.mark.parametrize("at", [0, 8, 16, 40, -33, -1])
def test_a_greeting_that_was_changed_on_its_way_is_corrupt(pair: Pair, at: int) -> None:
    middle_near, middle_far = socket.socketpair()
    pair.listen()

    def relay(change: Callable[[bytes], bytes]) -> None:
        for source, to in ((middle_far, pair.near), (pair.near, middle_far), (middle_far, pair.near)):
            to.sendall(source.recv(4096))
        pair.near.sendall(change(middle_far.recv(1 << 16)))
        pair.near.shutdown(socket.SHUT_WR)

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)

    thread = threading.Thread(target=relay, args=(flip,))
    thread.start()
    near = connect_proven(middle_near, "us", soon(), US)
    far = pair.outcome()
    assert isinstance(far, ProvenSocket)
    near.send(encode_greeting(GREETING), "us", soon())
    with pytest.raises((CorruptMessage, PeerLost, LayoutMismatch)):
        far.receive("us", soon())
    thread.join()


def test_keys_are_changed_one_after_the_other(pair: Pair) -> None:
    """Old parts prove with the old key while new ones accept both."""
    both = Identity.parse(f"{OTHERS}\n{OURS}\n")
    pair.listen(both)
    connect_proven(pair.near, "us", soon(), Identity.parse(OURS))
    assert isinstance(pair.outcome(), ProvenSocket)
