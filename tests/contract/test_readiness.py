"""No transport publishes a message before its bytes are there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from antiphon.core.errors import InternalError
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport import base
from antiphon.transport.base import HEADER_BYTES, Hello, Link, LinkLayout, Transport
from antiphon.transport.connect.choose import open_transport
from antiphon.transport.loopback import LoopbackTransport

TIMEOUT_S = 20.0
LAYOUT = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=())


class Late:
    """Bytes that a card writes when the test says so."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.there = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        self.asked.set()
        return self.there.wait(timeout_s)


@pytest.fixture(params=["loopback", "shm", "grpc"])
def links(request: pytest.FixtureRequest) -> Iterator[tuple[Link, Link]]:
    transport: Transport = open_transport(request.param)
    where = "here" if isinstance(transport, LoopbackTransport) else "127.0.0.1"
    listener = transport.listen(where, lambda _hello: Hello(worker_id=WorkerId("b"), epoch=Epoch(1), layout=LAYOUT))
    near = transport.connect(listener.address, Hello(worker_id=WorkerId("a"), epoch=Epoch(1), layout=LAYOUT), TIMEOUT_S)
    far = None
    while far is None:
        far = listener.accept()
    yield near, far
    for each in (near, far, listener):
        each.close()


def test_a_message_whose_bytes_come_late_is_not_seen_before(links: tuple[Link, Link]) -> None:
    near, far = links
    late = Late()
    slot = near.acquire()
    assert slot is not None
    slot.data.fill_(1)  # what lay there before
    sender = threading.Thread(target=near.commit, args=(slot, bytes(HEADER_BYTES), 64, late))
    sender.start()
    assert late.asked.wait(TIMEOUT_S)
    assert far.poll() is None
    assert not far.wait(0.05)
    slot.data.fill_(7)
    late.there.set()
    sender.join(TIMEOUT_S)
    assert far.wait(TIMEOUT_S)
    message = far.poll()
    assert message is not None
    assert message.data.tolist() == [7] * 64
    far.release(message)


def test_bytes_that_never_come_are_told_and_never_sent(links: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DEADLINE_S", 0.01)
    near, far = links
    slot = near.acquire()
    assert slot is not None
    with pytest.raises(InternalError, match="was not written"):
        near.commit(slot, bytes(HEADER_BYTES), 64, Late())
    assert far.poll() is None
