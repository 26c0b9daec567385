"""Slots in a card's memory, for which the host's stands in: when they are used, and when the other end is told of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from antiphon.core.errors import PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.flags import WRAP, PretendedFlags
from antiphon.device.shared import PRETENDED, PRETENDED_WITH_FLAGS, PretendedMemory, PretendedRegion
from antiphon.transport.base import HEADER_BYTES, Hello, LinkLayout
from antiphon.transport.shm.card_slots import FlagOrdered
from antiphon.transport.shm.ring import RingLink
from antiphon.transport.shm.transport import ShmTransport

TIMEOUT_S = 20.0


def hello(worker: str, memory: str, channel: str = "afd") -> Hello:
    layout = LinkLayout(channel=channel, num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=(), memory=memory)
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(1), layout=layout)


@contextmanager
def linked(near: str = PRETENDED, far: str = PRETENDED) -> Iterator[tuple[RingLink, RingLink]]:
    """(connecting, listening) end, each of which wants slots in the memory named."""
    with ExitStack() as undo:
        listener = ShmTransport().listen("", lambda _: hello("b", far))
        undo.callback(listener.close)
        one = undo.enter_context(closing(ShmTransport().connect(listener.address, hello("a", near), TIMEOUT_S)))
        other = None
        while other is None:
            other = listener.accept()
        assert isinstance(other, RingLink)
        undo.callback(other.close)
        yield one, other


@contextmanager
def closing(link: RingLink) -> Iterator[RingLink]:
    try:
        yield link
    finally:
        link.close()


def pass_on(link: RingLink, value: int) -> None:
    slot = link.acquire()
    assert slot is not None
    slot.data.fill_(value)
    link.commit(slot, bytes(HEADER_BYTES), 64)


def taken(link: RingLink) -> list[int]:
    assert link.wait(TIMEOUT_S)
    message = link.poll()
    assert message is not None
    values: list[int] = message.data.tolist()
    link.release(message)
    return values


@pytest.mark.parametrize(("near", "far"), [(PRETENDED, ""), ("", PRETENDED), (PRETENDED, "cuda"), ("cuda", "cuda")])
def test_slots_lie_in_host_memory_unless_both_ends_have_the_same_kind_of_card(near: str, far: str) -> None:
    with linked(near, far) as (one, other):  # two that say "cuda" where there is none can't make a region
        assert one.card is None
        assert other.card is None
        pass_on(one, 3)
        assert taken(other) == [3] * 64


@pytest.mark.parametrize("kind", [PRETENDED, PRETENDED_WITH_FLAGS])
def test_both_ends_see_one_region(kind: str) -> None:
    with linked(kind, kind) as (one, other):
        assert one.card is not None
        assert other.card is not None
        slot = one.acquire()
        assert slot is not None
        slot.data.fill_(9)
        assert (other.card.region.data == 9).sum() == 64
        one.commit(slot, bytes(HEADER_BYTES), 64)
        assert taken(other) == [9] * 64
        pass_on(other, 4)
        assert taken(one) == [4] * 64


def test_a_region_that_the_other_end_cant_open_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: PretendedMemory, handle: bytes, num_bytes: int) -> None:
        raise Unavailable("another card")

    monkeypatch.setattr(PretendedMemory, "open", refuses)
    with linked() as (one, other):
        assert one.card is None
        assert other.card is None
        for value in range(5):
            pass_on(one, value)
            assert taken(other) == [value] * 64
            pass_on(other, value)
            assert taken(one) == [value] * 64


def test_what_was_made_here_stays_when_the_other_end_is_gone() -> None:
    with linked() as (one, other):
        pass_on(other, 5)
        assert one.wait(TIMEOUT_S)
        message = one.poll()
        assert message is not None
        data = message.data
        other.close()
        assert data.tolist() == [5] * 64
        one.close()
        assert data.tolist() == [5] * 64  # the memory goes with the last tensor over it
        with pytest.raises(PeerLost):
            one.acquire()


class Late:
    """A card that is done when the test says so."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.done = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        self.asked.set()
        return self.done.wait(timeout_s)


def test_a_message_is_published_and_a_slot_given_back_only_when_the_card_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked() as (one, other):
        late = Late()
        monkeypatch.setattr(PretendedRegion, "settled", lambda _self: late)
        slot = one.acquire()
        assert slot is not None
        slot.data.fill_(1)
        sender = threading.Thread(target=one.commit, args=(slot, bytes(HEADER_BYTES), 64))  # whose caller thinks all is there
        sender.start()
        assert late.asked.wait(TIMEOUT_S)
        assert other.poll() is None
        assert not other.wait(0.05)
        slot.data.fill_(7)
        late.done.set()
        sender.join(TIMEOUT_S)
        assert other.wait(TIMEOUT_S)
        message = other.poll()
        assert message is not None
        assert message.data.tolist() == [7] * 64

        late = Late()
        reader = threading.Thread(target=other.release, args=(message,))
        reader.start()
        assert late.asked.wait(TIMEOUT_S)
        assert one.num_free_slots == 1  # it is still being read
        late.done.set()
        reader.join(TIMEOUT_S)
        assert one.num_free_slots == 2


@pytest.mark.parametrize("kind", [PRETENDED, PRETENDED_WITH_FLAGS])
def test_a_steady_exchange_of_many_rounds_uses_every_slot_again(kind: str) -> None:
    with linked(kind, kind) as (one, other):
        for value in range(50):
            pass_on(one, value)
            assert torch.tensor(taken(other)).eq(value).all()
        assert one.num_free_slots == 2


class HeldBack:
    """Writes of flags that a card has been asked for and has not come to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[PretendedFlags, int, int]] = []
        self._write = PretendedFlags.write
        monkeypatch.setattr(PretendedFlags, "write", lambda flags, word, value: self.asked.append((flags, word, value)))

    def come(self) -> None:
        for asked in self.asked:
            self._write(*asked)
        self.asked.clear()


def polling(link: RingLink) -> tuple[threading.Thread, list[list[int]]]:
    """Reads the next message on a thread, as a card does that is asked to."""
    found: list[list[int]] = []

    def read() -> None:
        assert link.wait(TIMEOUT_S)  # it is told of
        message = link.poll()
        assert message is not None
        found.append(message.data.tolist())

    thread = threading.Thread(target=read)
    thread.start()
    return thread, found


def test_a_message_is_told_of_before_its_bytes_are_there_and_read_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(PRETENDED_WITH_FLAGS, PRETENDED_WITH_FLAGS) as (one, other):
        card = HeldBack(monkeypatch)
        slot = one.acquire()
        assert slot is not None
        one.commit(slot, bytes(HEADER_BYTES), 64)
        thread, found = polling(other)
        thread.join(0.1)
        assert thread.is_alive()
        slot.data.fill_(7)
        card.come()
        thread.join(TIMEOUT_S)
        assert found == [[7] * 64]


def test_a_slot_given_back_is_written_behind_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(PRETENDED_WITH_FLAGS, PRETENDED_WITH_FLAGS) as (one, other):
        for value in range(2):
            pass_on(one, value)
        card = HeldBack(monkeypatch)
        for value in range(2):
            assert taken(other) == [value] * 64
        assert one.num_free_slots == 2  # the hosts are ahead
        thread = threading.Thread(target=one.acquire)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        card.come()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_a_wait_ends_at_once_when_the_other_end_is_gone_and_what_was_read_is_known_to_be_rubbish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with linked(PRETENDED_WITH_FLAGS, PRETENDED_WITH_FLAGS) as (one, other):
        HeldBack(monkeypatch)
        flags = other.card
        assert isinstance(flags, FlagOrdered)
        assert not flags.lost()
        pass_on(one, 7)
        thread, _ = polling(other)
        thread.join(0.1)
        assert thread.is_alive()
        one.close()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        assert flags.lost()
        with pytest.raises(PeerLost):
            other.poll()


@pytest.mark.parametrize("first", [0, WRAP - 3])
def test_sequence_numbers_wrap_around(first: int) -> None:
    region, _ = PretendedMemory().make(4096)
    flags = region.flags(0)
    for word in range(8):
        flags.write(word, first)
    over: list[bool] = []

    def is_gone() -> bool:
        over.append(True)
        return True

    one, other = (FlagOrdered(region, flags, 2, connecting=c, is_gone=is_gone, first=first) for c in (True, False))
    for _ in range(6):
        one.before_writing(1)
        one.written(1)
        other.before_reading(1)
        other.read(1)
    assert not over  # nobody had to wait
    one.written(1)
    one.before_writing(1)
    assert over  # for it is not read
    assert one.is_poisoned
    region.handed_over()
