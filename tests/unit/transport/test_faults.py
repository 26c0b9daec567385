import pytest

from antiphon.core.errors import PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import HEADER_BYTES, Hello, LinkLayout
from antiphon.transport.faults import Faults, FaultyLink
from antiphon.transport.loopback import LoopbackLink, loopback_pair


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def pair() -> tuple[LoopbackLink, LoopbackLink]:
    layout = LinkLayout(channel="afd", num_slots=8, send_slot_bytes=8, recv_slot_bytes=8, fields=())
    a, b = (Hello(worker_id=WorkerId(name), epoch=Epoch(1), layout=layout) for name in "ab")
    return loopback_pair(a, b)


def send(link: LoopbackLink, value: int) -> None:
    slot = link.acquire()
    assert slot is not None
    slot.data[:] = value
    link.commit(slot, bytes(HEADER_BYTES), 8)


def arrivals(seed: int) -> list[tuple[float, int]]:
    near, far = pair()
    clock = Clock()
    late = FaultyLink(far, Faults(seed=seed, min_delay_s=0.5, max_delay_s=2.0), clock)
    for value in range(5):
        send(near, value)
    seen: list[tuple[float, int]] = []
    while len(seen) < 5:
        message = late.poll()
        if message is None:
            clock.now_s += 0.125
        else:
            seen.append((clock.now_s, int(message.data[0])))
    return seen


def test_messages_come_late_and_in_order() -> None:
    seen = arrivals(seed=3)
    assert [value for _, value in seen] == [0, 1, 2, 3, 4]
    assert all(0.5 <= when <= 2.125 for when, _ in seen)


def test_the_same_seed_gives_the_same_delays_and_another_does_not() -> None:
    assert arrivals(seed=3) == arrivals(seed=3) != arrivals(seed=4)


def test_waiting_ends_when_a_late_message_is_due() -> None:
    near, far = pair()
    late = FaultyLink(far, Faults(min_delay_s=0.01, max_delay_s=0.01))
    send(near, 7)
    assert late.poll() is None
    assert late.wait(10.0)
    message = late.poll()
    assert message is not None
    assert message.data[0] == 7


def test_the_peer_is_lost_at_the_chosen_message_for_both_ends() -> None:
    near, far = pair()
    faulty = FaultyLink(far, Faults(lose_peer_after=2))
    for value in range(3):
        send(near, value)
    assert faulty.poll() is not None
    assert faulty.poll() is not None
    for call in (faulty.poll, faulty.acquire, lambda: faulty.wait(0.1)):
        with pytest.raises(PeerLost):
            call()
    with pytest.raises(PeerLost):
        near.poll()
