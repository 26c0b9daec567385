import itertools
import mmap
import random
import struct
import threading
from collections import deque

import pytest

from antiphon.transport.base import HEADER_BYTES, LinkLayout
from antiphon.transport.native import build
from antiphon.transport.shm.control_channel import CORRUPT, NOTHING, ControlChannel, can_spin, open_control_channel, spin
from antiphon.transport.shm.segment import Segment

NUM_SLOTS = 3
SEGMENT = Segment.of(
    LinkLayout(channel="afd", num_slots=NUM_SLOTS, send_slot_bytes=64, recv_slot_bytes=64, fields=()), connecting=True
)
HEADER = bytes(range(HEADER_BYTES))

needs_compiler = pytest.mark.skipif(build.load() is None, reason="no C compiler or no Python header")
NATIVE = pytest.param(True, marks=needs_compiler)
KINDS = [False, NATIVE]


class Ends:
    def __init__(self, near_native: bool, far_native: bool) -> None:
        self.memory = mmap.mmap(-1, SEGMENT.num_bytes)
        self.near: ControlChannel = open_control_channel(self.memory, SEGMENT, connecting=True, native=near_native)
        self.far: ControlChannel = open_control_channel(self.memory, SEGMENT, connecting=False, native=far_native)


@pytest.fixture(
    params=[
        pytest.param((near, far), marks=[needs_compiler] if near or far else [])
        for near, far in itertools.product([False, True], repeat=2)
    ],
    ids=lambda p: "-".join("native" if native else "python" for native in p),
)
def ends(request: pytest.FixtureRequest) -> Ends:
    return Ends(*request.param)


def test_slots_travel_out_and_back_in_any_order_for_many_laps(ends: Ends) -> None:
    rng = random.Random(4)
    for sender, receiver in ((ends.near, ends.far), (ends.far, ends.near)):
        free, under_way, held = list(range(NUM_SLOTS)), deque[tuple[int, int]](), list[int]()
        for turn in range(500):
            action = rng.randrange(3)
            if action == 0 and free:
                slot = free.pop(rng.randrange(len(free)))
                sender.publish(slot, HEADER, turn)
                under_way.append((slot, turn))
            elif action == 1:
                found = receiver.next()
                if under_way:
                    slot, num_bytes = under_way.popleft()
                    assert found == num_bytes << 16 | slot
                    held.append(slot)
                else:
                    assert found == NOTHING
            elif action == 2 and held:
                slot = held.pop(rng.randrange(len(held)))
                receiver.give(slot)
                assert sender.back() == slot
                assert sender.back() == NOTHING
                free.append(slot)


def test_the_header_lies_with_its_slot(ends: Ends) -> None:
    ends.near.publish(2, HEADER, 1)
    at = SEGMENT.directions[0].headers + 2 * HEADER_BYTES
    assert ends.memory[at : at + HEADER_BYTES] == HEADER


def test_a_sleeper_is_told_of_by_the_next_publish_only_while_it_sleeps(ends: Ends) -> None:
    assert not ends.near.publish(0, HEADER, 1)
    ends.far.park()
    assert ends.near.publish(1, HEADER, 1)
    ends.far.unpark()
    assert not ends.near.publish(2, HEADER, 1)


def test_only_a_starved_sleeper_is_told_of_by_a_slot_given_back(ends: Ends) -> None:
    ends.near.publish(0, HEADER, 1)
    ends.near.publish(1, HEADER, 1)
    ends.near.park()
    assert not ends.far.give(0)
    ends.near.unpark()
    assert not ends.near.pending()
    ends.near.starve(True)
    assert ends.near.pending()
    ends.near.park()
    assert ends.far.give(1)


@pytest.mark.parametrize("word", [5 << 16, (1 << 16) | NUM_SLOTS, 0xFFFFFFFFFFFFFFFF, 7])
def test_a_damaged_entry_is_corrupt_and_pending(ends: Ends, word: int) -> None:
    ends.memory[SEGMENT.directions[0].entries : SEGMENT.directions[0].entries + 8] = struct.pack("<Q", word)
    assert ends.far.pending()
    assert ends.far.next() == CORRUPT
    ends.memory[SEGMENT.directions[0].returns : SEGMENT.directions[0].returns + 8] = struct.pack("<Q", word)
    assert ends.near.back() == CORRUPT


def test_an_absurd_length_is_corrupt(ends: Ends) -> None:
    ends.near.publish(0, HEADER, 1 << 46)
    assert ends.far.next() == CORRUPT


def test_a_closed_channel_has_nothing_and_lets_the_memory_go(ends: Ends) -> None:
    ends.near.publish(0, HEADER, 1)
    for channel in (ends.near, ends.far):
        channel.close()
        assert channel.next() == channel.back() == NOTHING
        assert not channel.pending()
        channel.park()
        channel.unpark()
    ends.memory.close()


@needs_compiler
def test_spinning_ends_when_another_thread_publishes() -> None:
    ends = Ends(True, True)
    assert can_spin(ends.far)
    publisher = threading.Timer(0.01, ends.near.publish, (0, HEADER, 1))
    publisher.start()
    assert spin((ends.near, ends.far), 10.0)
    publisher.join()


@needs_compiler
def test_spinning_ends_when_its_window_is_over() -> None:
    assert not spin((Ends(True, True).far,), 0.001)


@needs_compiler
def test_the_native_channel_refuses_offsets_outside_of_its_memory() -> None:
    module = build.load()
    assert module is not None
    with pytest.raises(ValueError):
        module.ControlChannel(mmap.mmap(-1, 4096), 3, 0, 0, 0, 0, 0, 5000, 0)
    with pytest.raises(ValueError):
        module.ControlChannel(mmap.mmap(-1, 4096), 100, 0, 0, 0, 0, 0, 0, 0)
    channel = module.ControlChannel(mmap.mmap(-1, 4096), 2, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError):
        channel.publish(2, HEADER, 1)
    with pytest.raises(ValueError):
        channel.publish(0, b"short", 1)
    with pytest.raises(TypeError):
        channel.publish(0)
