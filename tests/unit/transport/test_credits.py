import pytest

from antiphon.transport.base import HEADER_BYTES
from antiphon.transport.credits import CREDIT, DATA, PREFIX, Credits, DamageError, is_credit

HEADER = bytes(HEADER_BYTES)


def data(slot: int, seq: int, num_bytes: int = 10) -> bytes:
    return PREFIX.pack(DATA, slot, seq, num_bytes) + HEADER


def test_what_one_end_sends_another_receives_and_its_credit_comes_back() -> None:
    here, there = Credits(2, 100), Credits(2, 100)
    slot = here.free.pop()
    assert there.receive(here.send(slot, 77) + HEADER) == (slot, 77)
    credit = there.release(slot)
    assert is_credit(credit)
    assert here.take_credit(credit) == slot


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x01",
        data(0, 0)[:-1],
        data(slot=2, seq=0),
        data(slot=0, seq=1),
        data(slot=0, seq=0, num_bytes=101),
        PREFIX.pack(7, 0, 0, 0) + HEADER,
    ],
    ids=["empty", "one byte", "short", "no such slot", "a message is missing", "too long", "unknown kind"],
)
def test_a_damaged_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(DamageError):
        Credits(2, 100).receive(frame)


def test_a_slot_sent_again_before_its_release_is_damage() -> None:
    mine = Credits(2, 100)
    mine.receive(data(1, 0))
    with pytest.raises(DamageError, match="before its release"):
        mine.receive(data(1, 1))


def test_a_credit_for_a_slot_that_is_not_in_flight_is_damage() -> None:
    mine = Credits(2, 100)
    with pytest.raises(DamageError):
        mine.take_credit(PREFIX.pack(CREDIT, 0, 0, 0))
    with pytest.raises(DamageError):
        mine.take_credit(PREFIX.pack(CREDIT, 0, 0, 0) + b"x")


def test_sequence_numbers_wrap_around() -> None:
    here, there = Credits(1, 10), Credits(1, 10)
    here._send_seq = there._recv_seq = 0xFFFFFFFF
    for _ in range(3):
        there.receive(here.send(0, 1) + HEADER)
        here.take_credit(there.release(0))
    assert here._send_seq == there._recv_seq == 2
