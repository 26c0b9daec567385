import time

import pytest

from antiphon.core.errors import InvalidInput, LayoutMismatch, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.connect.choose import connect_auto, listen_all, open_transport
from antiphon.transport.grpc import GrpcLink
from antiphon.transport.shm.ring import RingLink


def hello(worker: str, model: str = "m") -> Hello:
    layout = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=64, recv_slot_bytes=64, fields=(("model", model),))
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(1), layout=layout)


def test_shared_memory_is_taken_where_it_opens() -> None:
    listener = listen_all(("grpc", "shm"), "127.0.0.1", lambda _: hello("b"))
    with pytest.raises(Unavailable):
        connect_auto([], hello("a"), 1.0)
    link = open_transport("auto").connect(listener.address, hello("a"), 10.0)
    assert isinstance(link, RingLink)
    listener.close()
    link.close()


def test_where_shared_memory_does_not_open_the_next_is_taken() -> None:
    listener = listen_all(("grpc",), "127.0.0.1", lambda _: hello("b"))
    link = connect_auto(["shm://antiphon-of-another-machine", listener.address], hello("a"), 10.0)
    assert isinstance(link, GrpcLink)
    listener.close()
    link.close()


def test_when_nothing_opens_every_reason_is_told() -> None:
    addresses = ["shm://antiphon-of-another-machine", "grpc://127.0.0.1:1"]
    with pytest.raises(Unavailable, match=r"no shared memory.*;.*grpc://127\.0\.0\.1:1"):
        connect_auto(addresses, hello("a"), 5.0)
    with pytest.raises(Unavailable, match="no known transport"):
        connect_auto(["carrier://pigeon"], hello("a"), 5.0)


def test_a_layout_mismatch_is_not_tried_again_over_the_next_transport() -> None:
    listener = listen_all(("shm", "grpc"), "127.0.0.1", lambda _: hello("b", model="other"))
    with pytest.raises(LayoutMismatch, match="model m against other"):
        connect_auto(listener.address.split(","), hello("a"), 10.0)
    deadline = time.monotonic() + 10
    while (refused := listener.refused()) is None:
        assert time.monotonic() < deadline
    assert isinstance(refused, LayoutMismatch)
    assert listener.refused() is None
    listener.close()


def test_an_unknown_transport_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'tcp'.*auto, loopback, shm, nixl, grpc"):
        open_transport("tcp")
