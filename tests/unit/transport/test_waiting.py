"""Waiting on several peers: while one is spun on, nothing that another says is missed; and nothing is rung about twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import HEADER_BYTES, Hello, Link, LinkLayout, Listener
from antiphon.transport.connect.listener import QueuedListener
from antiphon.transport.shm.transport import ShmTransport
from antiphon.transport.waiting import WaitSet, let_others_run

LONG_S = 5.0


def hello(name: str) -> Hello:
    layout = LinkLayout(channel="test", num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=())
    return Hello(worker_id=WorkerId(name), epoch=Epoch(1), layout=layout)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = ShmTransport(spin_s=60.0).listen("", lambda _theirs: hello("near"))
    yield listener
    listener.close()


def link_pair(listener: Listener, name: str, spin_s: float) -> tuple[Link, Link]:
    far = ShmTransport(spin_s=spin_s).connect(listener.address, hello(name), LONG_S)
    deadline = time.monotonic() + LONG_S
    while (near := listener.accept()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return near, far


def say(link: Link) -> None:
    slot = link.acquire()
    assert slot is not None
    link.commit(slot, bytes(HEADER_BYTES), 8)


def test_a_quiet_peer_is_heard_while_another_is_spun_on(listener: Listener) -> None:
    busy, busy_far = link_pair(listener, "busy", 60.0)
    quiet, quiet_far = link_pair(listener, "quiet", 60.0)
    quiet._spin_s = 0.0  # type: ignore[attr-defined]  # long since it moved
    waiting = WaitSet([busy, quiet])
    speaker = threading.Timer(0.05, say, [quiet_far])
    speaker.start()
    assert waiting.wait(LONG_S)
    assert quiet.poll() is not None
    assert busy.poll() is None
    speaker.join()
    for link in (busy, quiet, busy_far, quiet_far):
        link.close()


def test_an_arrival_is_noticed_while_a_link_is_spun_on(listener: Listener) -> None:
    busy, busy_far = link_pair(listener, "busy", 60.0)
    queue = QueuedListener(lambda _theirs: hello("near"))
    waiting = WaitSet([queue, busy])
    guest, guest_far = link_pair(listener, "guest", 60.0)
    arrival = threading.Timer(0.05, queue.arrive, [guest])
    arrival.start()
    assert waiting.wait(LONG_S)
    assert queue.accept() is guest
    arrival.join()
    queue.close()
    for link in (busy, busy_far, guest, guest_far):
        link.close()


def test_a_wakeup_that_came_for_what_was_collected_already_wakes_once(listener: Listener) -> None:
    queue = QueuedListener(lambda _theirs: hello("near"))
    near, far = link_pair(listener, "guest", 0.0)
    queue.arrive(near)
    assert queue.accept() is near
    queue._wakeup.ring()  # as an arrival does whose link was collected between its two steps
    naps = 0
    park = queue.park

    def counted() -> object:
        nonlocal naps
        naps += 1
        return park()

    queue.park = counted  # type: ignore[method-assign, assignment]
    assert not WaitSet([queue]).wait(0.2)
    assert naps <= 3
    queue.close()
    near.close()
    far.close()


def test_several_threads_may_let_others_run_at_once() -> None:
    failures: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(2000):
                let_others_run()
        except BaseException as error:  # noqa: BLE001  # asserted below
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert not failures


def test_a_wait_shorter_than_the_spinning_does_not_sleep_on(listener: Listener) -> None:
    near, far = link_pair(listener, "peer", 60.0)
    parked: list[bool] = []
    park = near.park

    def noted() -> object:
        parked.append(True)
        return park()

    near.park = noted  # type: ignore[method-assign, assignment]
    assert not WaitSet([near]).wait(0.002)
    assert not parked
    near.close()
    far.close()
