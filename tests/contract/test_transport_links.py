"""What every transport promises behind the one seam. The same tests run over each."""

from __future__ import annotations

import gc
import hmac
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from antiphon.core.errors import LayoutMismatch, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.shared import PRETENDED, PRETENDED_WITH_FLAGS
from antiphon.transport.base import HEADER_BYTES, Answer, Hello, Link, LinkLayout, Listener, Message, Transport
from antiphon.transport.connect.choose import open_transport
from antiphon.transport.faults import Faults, FaultyLink
from antiphon.transport.loopback import LoopbackTransport
from antiphon.transport.shm.ring import RingLink
from antiphon.transport.shm.transport import ShmTransport
from antiphon.transport.waiting import WaitSet

T = TypeVar("T")
TIMEOUT_S = 10.0  # how long a test waits before it fails; nothing here takes long on an idle machine
PEER = Path(__file__).with_name("link_peer.py")
LOSS_S = 3.0  # a killed peer must be noticed within this on a busy machine

needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="nixl-cu12 is not installed")
BETWEEN_PROCESSES = [
    pytest.param("grpc"),
    pytest.param("shm"),
    pytest.param("shm-python"),
    pytest.param("shm-directory"),
    pytest.param("shm-card"),
    pytest.param("shm-flags"),
    pytest.param("nixl", marks=needs_nixl),
]


class OnPretendedCard(ShmTransport):
    """Both ends want their slots in a card's memory, for which the host's stands in."""

    def __init__(self, memory: str) -> None:
        super().__init__()
        self.memory = memory

    def listen(self, host: str, answer: Answer) -> Listener:
        return super().listen(host, lambda theirs: self.on_card(answer(theirs)))

    def connect(self, address: str, hello: Hello, timeout_s: float) -> RingLink:
        return super().connect(address, self.on_card(hello), timeout_s)

    def on_card(self, hello: Hello) -> Hello:
        return replace(hello, layout=replace(hello.layout, memory=self.memory))


def make(name: str, directory: Path) -> Transport:
    if name in ("shm-card", "shm-flags"):
        return OnPretendedCard(PRETENDED if name == "shm-card" else PRETENDED_WITH_FLAGS)
    if name == "shm-python":
        return ShmTransport(native=False)
    if name == "shm-directory":
        return ShmTransport(directory=directory)
    return open_transport(name)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets stay within the 107 characters that a unix socket's path may have."""
    with tempfile.TemporaryDirectory(prefix="links-") as path:
        yield Path(path)


@pytest.fixture(params=["loopback", *BETWEEN_PROCESSES])
def transport(request: pytest.FixtureRequest, short_path: Path) -> Transport:
    return make(request.param, short_path)


@pytest.fixture(params=BETWEEN_PROCESSES)
def remote(request: pytest.FixtureRequest, short_path: Path) -> Transport:
    return make(request.param, short_path)


def layout(num_slots: int = 3, send: int = 4096, recv: int = 4096, **fields: str) -> LinkLayout:
    return LinkLayout(
        channel="afd",
        num_slots=num_slots,
        send_slot_bytes=send,
        recv_slot_bytes=recv,
        fields=tuple(fields.items()),
    )


def hello(worker: str, of: LinkLayout, epoch: int = 1) -> Hello:
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(epoch), layout=of)


def mirrored(of: LinkLayout) -> LinkLayout:
    return replace(of, send_slot_bytes=of.recv_slot_bytes, recv_slot_bytes=of.send_slot_bytes)


def eventually(get: Callable[[], T | None], timeout_s: float = TIMEOUT_S) -> T:
    deadline = time.monotonic() + timeout_s
    while (found := get()) is None or found is False:
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0)
    return found


@contextmanager
def listening(transport: Transport, answer: Answer) -> Iterator[Listener]:
    listener = transport.listen("127.0.0.1" if not isinstance(transport, LoopbackTransport) else "here", answer)
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def pair(transport: Transport, of: LinkLayout) -> Iterator[tuple[Link, Link]]:
    """The connecting end, whose layout is ``of``, and the accepted end."""
    with listening(transport, lambda _: hello("ffn/0", mirrored(of), epoch=5)) as listener:
        near = transport.connect(listener.address, hello("attention/0", of, epoch=3), TIMEOUT_S)
        far = eventually(listener.accept)
        try:
            yield near, far
        finally:
            near.close()
            far.close()


def header(number: int) -> bytes:
    return number.to_bytes(8, "little") * (HEADER_BYTES // 8)


def send(link: Link, content: torch.Tensor, number: int = 0) -> None:
    slot = eventually(link.acquire)
    slot.data[: content.shape[0]].copy_(content)
    link.commit(slot, header(number), content.shape[0])


def receive(link: Link) -> Message:
    return eventually(link.poll)


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- opening -------------------------------------------------------------------------------------------------------------


def test_each_end_knows_who_the_other_is(transport: Transport) -> None:
    with pair(transport, layout()) as (near, far):
        assert (near.peer, near.peer_epoch) == ("ffn/0", 5)
        assert (far.peer, far.peer_epoch) == ("attention/0", 3)


def test_a_layout_mismatch_is_named_on_both_ends(transport: Transport) -> None:
    near, far = layout(model="a", dtype="bfloat16"), layout(send=8192, model="b", dtype="bfloat16")
    with listening(transport, lambda _: hello("ffn/0", far)) as listener:
        with pytest.raises(LayoutMismatch) as here:
            transport.connect(listener.address, hello("attention/0", near), TIMEOUT_S)
        there = eventually(listener.refused)
        assert listener.accept() is None
    assert isinstance(there, LayoutMismatch)
    assert "model a against b" in str(here.value)
    assert "recv_slot_bytes 4096 against its send_slot_bytes 8192" in str(here.value)
    assert "model b against a" in str(there)
    assert "attention/0" in str(there)
    assert "dtype" not in str(here.value) + str(there)


def test_a_listener_can_refuse_a_peer_with_its_reason(transport: Transport) -> None:
    def answer(theirs: Hello) -> Hello:
        raise Unavailable("draining")

    with listening(transport, answer) as listener:
        with pytest.raises(Unavailable, match="draining"):
            transport.connect(listener.address, hello("attention/0", layout()), TIMEOUT_S)
        assert "draining" in str(eventually(listener.refused))


def test_a_bug_in_the_answer_is_raised_to_the_listeners_owner_and_turns_the_peer_away(transport: Transport) -> None:
    def answer(theirs: Hello) -> Hello:
        raise ZeroDivisionError

    with listening(transport, answer) as listener:
        with pytest.raises(Unavailable):
            transport.connect(listener.address, hello("attention/0", layout()), TIMEOUT_S)
        with pytest.raises(ZeroDivisionError):
            eventually(listener.accept)
        assert listener.accept() is None


def test_connecting_to_nobody_is_unavailable(transport: Transport) -> None:
    with listening(transport, lambda _: hello("ffn/0", layout())) as listener:
        address = listener.address
    with pytest.raises(Unavailable):
        transport.connect(address, hello("attention/0", layout()), 2.0)


def test_many_links_share_one_listener(transport: Transport) -> None:
    of = layout(num_slots=1, send=64, recv=64)
    with listening(transport, lambda _: hello("ffn/0", of)) as listener:
        near = [transport.connect(listener.address, hello(f"attention/{i}", of), TIMEOUT_S) for i in range(6)]
        far = {link.peer: link for link in (eventually(listener.accept) for _ in near)}
        for i, link in enumerate(near):
            send(link, noise(64, i), i)
        for i in reversed(range(6)):
            message = receive(far[WorkerId(f"attention/{i}")])
            assert torch.equal(message.data, noise(64, i))
        for link in [*near, *far.values()]:
            link.close()


def test_links_outlive_their_listener(transport: Transport) -> None:
    of = layout()
    with listening(transport, lambda _: hello("ffn/0", of)) as listener:
        near = transport.connect(listener.address, hello("attention/0", of), TIMEOUT_S)
        far = eventually(listener.accept)
    send(near, noise(100, 1))
    assert torch.equal(receive(far).data, noise(100, 1))
    near.close()
    far.close()


# --- messages ------------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_the_order_of_their_commits_with_their_headers(transport: Transport) -> None:
    with pair(transport, layout(num_slots=3)) as (near, far):
        slots = [eventually(near.acquire) for _ in range(3)]
        for number, slot in enumerate(reversed(slots)):
            slot.data[:8] = number
            near.commit(slot, header(number), 8)
        for number in range(3):
            message = receive(far)
            assert bytes(message.header) == header(number)
            assert message.data.tolist() == [number] * 8


@pytest.mark.parametrize("num_bytes", [1, 63, 4096, 65_537, 3 << 20])
def test_content_arrives_unchanged_whatever_its_size(transport: Transport, num_bytes: int) -> None:
    with pair(transport, layout(num_slots=2, send=num_bytes, recv=num_bytes)) as (near, far):
        for turn in range(3):
            send(near, noise(num_bytes, turn), turn)
            message = receive(far)
            assert torch.equal(message.data, noise(num_bytes, turn))
            far.release(message)
            send(far, noise(num_bytes, turn + 50), turn)
            answer = receive(near)
            assert torch.equal(answer.data, noise(num_bytes, turn + 50))
            near.release(answer)


@pytest.mark.parametrize("name", ["shm", "shm-python", pytest.param("nixl", marks=needs_nixl)])
def test_a_link_that_is_open_proves_nothing_any_more(name: str, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_proofs = 0
    digest = hmac.digest

    def counted(key: bytes, message: bytes, method: str) -> bytes:
        nonlocal num_proofs
        num_proofs += 1
        return digest(key, message, method)

    monkeypatch.setattr(hmac, "digest", counted)
    with pair(make(name, short_path), layout()) as (near, far):
        assert num_proofs > 0  # it was opened with some
        num_proofs = 0
        for turn in range(100):
            for here, there in ((near, far), (far, near)):
                send(here, noise(4096, turn), turn)
                message = receive(there)
                assert torch.equal(message.data, noise(4096, turn))
                there.release(message)
        assert num_proofs == 0


def test_a_direction_may_have_no_payload_at_all(transport: Transport) -> None:
    with pair(transport, layout(send=4096, recv=0)) as (near, far):
        slot = eventually(far.acquire)
        far.commit(slot, header(9), 0)
        message = receive(near)
        assert bytes(message.header) == header(9)
        assert message.data.shape == (0,)


def test_a_header_of_the_wrong_length_is_a_bug_of_the_caller(transport: Transport) -> None:
    with pair(transport, layout()) as (near, _), pytest.raises(ValueError):
        near.commit(eventually(near.acquire), b"short", 1)


def test_no_slot_is_free_until_the_receiver_releases_one(transport: Transport) -> None:
    with pair(transport, layout(num_slots=2)) as (near, far):
        for number in range(2):
            send(near, noise(10, number), number)
        first, second = receive(far), receive(far)
        assert near.acquire() is None
        far.release(second)  # the order of releases is the receiver's own
        send(near, noise(20, 7), 7)
        assert near.acquire() is None
        assert torch.equal(first.data, noise(10, 0))
        assert bytes(first.header) == header(0)
        assert torch.equal(receive(far).data, noise(20, 7))


def test_both_directions_interleaved_at_random_lose_and_mix_nothing(transport: Transport) -> None:
    rng = random.Random(20)
    num_slots = 3
    with pair(transport, layout(num_slots=num_slots, send=2000, recv=3000)) as ends:
        sizes = (2000, 3000)
        sent: tuple[deque[tuple[int, int]], ...] = (deque(), deque())  # (number, bytes) by sending end
        held: tuple[list[tuple[Message, int, int]], ...] = ([], [])  # by receiving end
        numbers, received = [0, 0], [0, 0]
        deadline = time.monotonic() + 60
        while min(received) < 300:
            assert time.monotonic() < deadline
            me = rng.randrange(2)
            action = rng.random()
            if action < 0.4:
                slot = ends[me].acquire()
                in_flight = len(sent[me]) + len(held[1 - me])
                assert slot is None or in_flight < num_slots
                if slot is not None:
                    number, num_bytes = numbers[me], rng.randint(1, sizes[me])
                    slot.data[:num_bytes].copy_(noise(num_bytes, number))
                    ends[me].commit(slot, header(number), num_bytes)
                    sent[me].append((number, num_bytes))
                    numbers[me] += 1
            elif action < 0.7:
                message = ends[me].poll()
                if message is not None:
                    number, num_bytes = sent[1 - me].popleft()
                    assert bytes(message.header) == header(number)
                    held[me].append((message, number, num_bytes))
                    received[me] += 1
            elif held[me]:
                message, number, num_bytes = held[me].pop(rng.randrange(len(held[me])))
                assert torch.equal(message.data, noise(num_bytes, number)), "a held message changed before its release"
                ends[me].release(message)


def test_late_messages_in_both_directions_arrive_whole_and_in_order(transport: Transport) -> None:
    with pair(transport, layout(num_slots=3)) as ends:
        near, far = (FaultyLink(link, Faults(seed=seed, max_delay_s=0.002)) for seed, link in enumerate(ends))
        expected = {near: 0, far: 0}
        sent = {near: 0, far: 0}
        deadline = time.monotonic() + 60
        while min(expected.values()) < 40:
            assert time.monotonic() < deadline
            for link in (near, far):
                if sent[link] < 40 and (slot := link.acquire()) is not None:
                    slot.data[:100].copy_(noise(100, sent[link]))
                    link.commit(slot, header(sent[link]), 100)
                    sent[link] += 1
                if (message := link.poll()) is not None:
                    assert bytes(message.header) == header(expected[link])
                    assert torch.equal(message.data, noise(100, expected[link]))
                    expected[link] += 1
                    link.release(message)


# --- waiting -------------------------------------------------------------------------------------------------------------


def test_wait_returns_at_its_deadline_and_not_before(transport: Transport) -> None:
    with pair(transport, layout()) as (near, _):
        started = time.monotonic()
        assert near.wait(0.15) is False
        assert 0.145 <= time.monotonic() - started < 2.0


def test_wait_ends_when_a_message_comes(transport: Transport) -> None:
    with pair(transport, layout()) as (near, far):
        assert far.wait(0.02) is False  # asleep, no longer spinning
        sender = threading.Thread(target=send, args=(near, noise(10, 1)))
        sender.start()
        deadline = time.monotonic() + TIMEOUT_S
        while not far.wait(TIMEOUT_S):
            assert time.monotonic() < deadline
        assert torch.equal(receive(far).data, noise(10, 1))
        sender.join()


def test_wait_ends_when_the_slot_that_was_lacking_comes_back(transport: Transport) -> None:
    with pair(transport, layout(num_slots=1)) as (near, far):
        send(near, noise(10, 1))
        assert near.acquire() is None
        message = receive(far)
        releaser = threading.Thread(target=far.release, args=(message,))
        releaser.start()
        started = time.monotonic()
        while (slot := near.acquire()) is None:
            near.wait(TIMEOUT_S)
        assert slot is not None
        assert time.monotonic() - started < TIMEOUT_S
        releaser.join()


def test_a_wait_set_wakes_for_any_link_and_for_a_new_one(transport: Transport) -> None:
    of = layout()
    with listening(transport, lambda _: hello("ffn/0", of)) as listener:
        waiting = WaitSet([listener])
        assert waiting.wait(0.02) is False
        near, far = [], list[Link]()
        for i in range(3):
            near.append(transport.connect(listener.address, hello(f"attention/{i}", of), TIMEOUT_S))
            assert eventually(lambda: waiting.wait(1.0))
            far.append(eventually(listener.accept))
            waiting.add(far[-1])
        assert waiting.wait(0.02) is False
        sender = threading.Thread(target=send, args=(near[1], noise(10, 1)))
        sender.start()
        assert eventually(lambda: waiting.wait(TIMEOUT_S))
        message = eventually(lambda: next((m for link in far if (m := link.poll()) is not None), None))
        assert torch.equal(message.data, noise(10, 1))
        sender.join()
        for link in [*near, *far]:
            link.close()


def test_an_idle_wait_uses_little_cpu(transport: Transport) -> None:
    with pair(transport, layout()) as (near, far):
        near.wait(0.01)
        far.wait(0.01)
        before = time.process_time()
        near.wait(0.4)
        far.wait(0.4)
        assert time.process_time() - before < 0.12


# --- ends ----------------------------------------------------------------------------------------------------------------


def calls(link: Link) -> dict[str, Callable[[], object]]:
    return {"poll": link.poll, "acquire": link.acquire, "wait": lambda: link.wait(LOSS_S)}


def raises_peer_lost(call: Callable[[], object]) -> bool | None:
    try:
        call()
    except PeerLost:
        return True
    return None


def test_what_was_sent_before_a_close_still_arrives_then_every_call_says_the_peer_is_lost(transport: Transport) -> None:
    with pair(transport, layout()) as (near, far):
        send(near, noise(10, 1))
        slot = eventually(far.acquire)
        near.close()
        message = receive(far)
        assert torch.equal(message.data, noise(10, 1))
        assert eventually(lambda: raises_peer_lost(far.poll), LOSS_S)
        for call in calls(far).values():
            with pytest.raises(PeerLost, match="attention/0"):
                call()
        with pytest.raises(PeerLost):
            far.commit(slot, header(0), 1)
        far.release(message)
        assert torch.equal(message.data, noise(10, 1)), "memory in the consumer's hands outlives the peer"


@pytest.mark.parametrize("call", ["poll", "acquire", "wait"])
def test_a_peer_that_closes_is_noticed_by(transport: Transport, call: str) -> None:
    with pair(transport, layout()) as (near, far):
        far.close()
        assert eventually(lambda: raises_peer_lost(calls(near)[call]), LOSS_S)


def test_after_its_own_close_a_link_raises_and_closes_again_quietly(transport: Transport) -> None:
    with pair(transport, layout()) as (near, far):
        send(far, noise(10, 1))
        message = receive(near)
        near.close()
        near.close()
        for call in calls(near).values():
            with pytest.raises(PeerLost):
                call()
        near.release(message)


@pytest.mark.parametrize("call", ["poll", "acquire", "wait"])
def test_a_killed_peer_is_noticed_by(remote: Transport, call: str) -> None:
    with listening(remote, lambda theirs: hello("ffn/0", mirrored(theirs.layout))) as listener:
        memory = remote.memory if isinstance(remote, OnPretendedCard) else ""
        process = subprocess.Popen([sys.executable, str(PEER), listener.address, memory])
        try:
            link = eventually(listener.accept, 60)
            if isinstance(remote, OnPretendedCard):
                assert isinstance(link, RingLink)
                assert link.card is not None
            send(link, noise(1000, 3), 3)
            echo = receive(link)
            assert torch.equal(echo.data, noise(1000, 3))
            link.release(echo)
            if call == "wait":
                killer = threading.Timer(0.05, process.kill)  # while the receiver sleeps
                killer.start()
            else:
                process.send_signal(signal.SIGKILL)
            assert eventually(lambda: raises_peer_lost(calls(link)[call]), LOSS_S)
            assert raises_peer_lost(calls(link)[call])
            link.close()
        finally:
            process.kill()
            process.wait()


def open_resources() -> tuple[int, int, int]:
    gc.collect()
    with Path("/proc/self/maps").open() as maps:
        segments = sum("antiphon-link" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), segments


def test_nothing_is_left_after_close(transport: Transport) -> None:
    def once() -> None:
        with pair(transport, layout(num_slots=2)) as (near, far):
            send(near, noise(10, 1))
            far.wait(TIMEOUT_S)
            message = receive(far)
            far.wait(0.001)
            far.release(message)
            near.wait(0.001)

    once()  # what a library keeps for ever, it takes now
    before = open_resources()
    for _ in range(3):
        once()
    eventually(lambda: all(now <= then for now, then in zip(open_resources(), before, strict=True)))
