import pytest

from antiphon.core.errors import InvalidInput, LayoutMismatch, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import HEADER_BYTES, Hello, LinkLayout
from antiphon.transport.loopback import LoopbackLink, LoopbackTransport, loopback_pair

HEADER = bytes(HEADER_BYTES)


def hello(worker: str, send: int = 64, recv: int = 64) -> Hello:
    layout = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=send, recv_slot_bytes=recv, fields=())
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(1), layout=layout)


def pair() -> tuple[LoopbackLink, LoopbackLink]:
    return loopback_pair(hello("a"), hello("b"))


def send(link: LoopbackLink, value: int) -> None:
    slot = link.acquire()
    assert slot is not None
    slot.data[:] = value
    link.commit(slot, HEADER, 64)


def test_the_receiver_gets_the_very_memory_the_sender_wrote() -> None:
    a, b = pair()
    slot = a.acquire()
    assert slot is not None
    a.commit(slot, HEADER, 64)
    message = b.poll()
    assert message is not None
    assert message.data.data_ptr() == slot.data.data_ptr()


def test_a_pair_needs_fitting_layouts() -> None:
    with pytest.raises(LayoutMismatch, match="send_slot_bytes 32"):
        loopback_pair(hello("a", send=32), hello("b"))


def echo(link: LoopbackLink) -> None:
    message = link.poll()
    if message is not None:
        send(link, int(message.data[0]) + 1)
        link.release(message)


def test_polling_runs_the_peer_inline_before_it_looks() -> None:
    a, b = pair()
    a.on_poll = lambda: echo(b)
    send(a, 4)
    answer = a.poll()
    assert answer is not None
    assert answer.data[0] == 5


def test_waiting_runs_the_peer_inline_until_it_answers() -> None:
    a, b = pair()
    turns: list[int] = []

    def answer_at_third_turn() -> None:
        turns.append(len(turns))
        if len(turns) == 3:
            echo(b)

    a.on_poll = answer_at_third_turn
    send(a, 4)
    assert a.wait(10.0)
    assert len(turns) == 3


def test_two_ends_that_run_each_other_inline_do_not_recurse() -> None:
    a, b = pair()
    depth = [0, 0]

    def pump(link: LoopbackLink, me: int) -> None:
        depth[me] += 1
        assert depth[me] == 1
        link.poll()
        depth[me] -= 1

    a.on_poll = lambda: pump(b, 1)
    b.on_poll = lambda: pump(a, 0)
    assert a.poll() is None
    assert b.poll() is None
    assert not a.wait(0.005)


def test_what_the_inline_peer_raises_reaches_the_poller_and_the_link_goes_on() -> None:
    a, b = pair()

    def fail() -> None:
        raise ZeroDivisionError

    a.on_poll = fail
    with pytest.raises(ZeroDivisionError):
        a.poll()
    a.on_poll = lambda: echo(b)
    send(a, 1)
    assert a.poll() is not None


def test_a_name_is_listened_on_once_and_free_again_after_close() -> None:
    transport = LoopbackTransport()
    listener = transport.listen("ffn", lambda _: hello("b"))
    with pytest.raises(InvalidInput):
        transport.listen("ffn", lambda _: hello("b"))
    listener.close()
    listener.close()
    transport.listen("ffn", lambda _: hello("b")).close()


def test_a_link_nobody_accepted_is_lost_when_the_listener_closes() -> None:
    transport = LoopbackTransport()
    listener = transport.listen("ffn", lambda _: hello("b"))
    link = transport.connect(listener.address, hello("a"), 1.0)
    listener.close()
    with pytest.raises(PeerLost):
        link.poll()
