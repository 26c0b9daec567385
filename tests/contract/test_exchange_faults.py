"""What either end of the layer exchange does with a peer that stops reading, is silent or sends nonsense: in time, and by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.ffn_side import FFNSide
from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.core.errors import CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.loopback import LoopbackLink, loopback_pair

WIDTH, ROWS = 8, 2
TIMEOUT_S = 0.05
FFN, ATTENTION = WorkerId("test/ffn/0"), WorkerId("test/attention/0")


def pair(num_slots: int = 3, ffn: WorkerId = FFN) -> tuple[LoopbackLink, LoopbackLink]:
    """(attention end, FFN end)."""
    size = 16 * WIDTH * 4
    layout = LinkLayout(channel="afd", num_slots=num_slots, send_slot_bytes=size, recv_slot_bytes=size, fields=())
    return loopback_pair(
        Hello(worker_id=ATTENTION, epoch=Epoch(1), layout=layout), Hello(worker_id=ffn, epoch=Epoch(1), layout=layout)
    )


def attention_side(link: LoopbackLink, num_ubatches: int = 2) -> AttentionSide:
    side = AttentionSide(
        epoch=Epoch(1),
        num_shards=1,
        num_ubatches=num_ubatches,
        hidden_size=WIDTH,
        dtype=torch.float32,
        return_dtype=torch.float32,
        answer_timeout_s=TIMEOUT_S,
        hold_s=TIMEOUT_S,
    )
    side.add_link(0, link)
    return side


def ffn_side(link: LoopbackLink) -> FFNSide:
    side = FFNSide(
        epoch=Epoch(1),
        hidden_size=WIDTH,
        dtype=torch.float32,
        return_dtype=torch.float32,
        compute_dtype=torch.float32,
        experts_per_row=[0] * 4,
    )
    side.add_link(link)
    return side


def answer(far: LoopbackLink, change: Callable[[Header], Header] = lambda h: h, num_bytes: int | None = None) -> int:
    """Take one A2F message and answer it with the rows themselves, after ``change`` of the header; its ubatch."""
    message = far.poll()
    assert message is not None
    asked = unpack(message.header, far.peer)
    slot = far.acquire()
    assert slot is not None
    size = ROWS * WIDTH * 4
    slot.data[:size].copy_(message.data)
    far.release(message)
    good = asked._replace(kind=Kind.F2A, spare=0)
    far.commit(slot, change(good).pack(), size if num_bytes is None else num_bytes)
    return asked.ubatch


def test_an_ffn_worker_that_never_answers_is_lost_in_time_and_by_name() -> None:
    near, far = pair()
    side = attention_side(near)
    start = time.monotonic()
    side.send(1, 0, 0, torch.ones(ROWS, WIDTH))
    with pytest.raises(PeerLost, match=r"test/ffn/0.*owed an answer for 0.05 s"):
        side.receive(0)
    assert time.monotonic() - start < 20 * TIMEOUT_S
    assert isinstance(side.losses[-1], PeerLost)
    with pytest.raises(PeerLost):
        far.acquire()


def test_an_ffn_worker_that_stops_reading_is_lost_when_its_ring_is_full() -> None:
    near, _ = pair(num_slots=1)
    side = attention_side(near)
    side.send(1, 0, 0, torch.ones(ROWS, WIDTH))
    with pytest.raises(PeerLost, match=r"test/ffn/0.*took no rows for 0.05 s"):
        side.send(1, 0, 1, torch.ones(ROWS, WIDTH))


def test_a_stopped_worker_is_lost_when_others_say_so_and_its_late_answer_is_nobodys() -> None:
    """Its replica gets the rows; what it says after that, of the same step and layer, is not taken for the replica's answer."""
    near, far = pair()
    other_near, other_far = pair(ffn=WorkerId("test/ffn/1"))
    side = attention_side(near)
    side.add_link(0, other_near)
    rows = torch.ones(ROWS, WIDTH)
    side.send(1, 0, 0, rows)
    ((stopped, owed_s),) = side.owing().items()
    assert stopped == (FFN, Epoch(1))
    assert owed_s >= 0
    side.lose(stopped, "it is silent")
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(side.receive, 0)
        end = time.monotonic() + 5.0
        while not other_far.pending() and time.monotonic() < end:
            time.sleep(0.001)
        with pytest.raises(PeerLost):
            answer(far)
        answer(other_far)
        assert torch.equal(received.result(5.0), rows)
    assert str(side.losses[0]) == "peer test/ffn/0 lost: it is silent"
    side.close()


def test_whoever_has_answered_by_then_is_not_lost() -> None:
    near, far = pair()
    side = attention_side(near)
    side.send(1, 0, 0, torch.ones(ROWS, WIDTH))
    answer(far)
    side.receive(0)
    side.lose((FFN, Epoch(1)), "it is silent")
    side.send(1, 0, 1, torch.ones(ROWS, WIDTH))
    answer(far, lambda h: h._replace(ubatch=1))
    side.receive(1)
    assert not side.losses
    side.close()


def test_a_shard_is_held_for_once_and_is_not_missing_any_more_when_somebody_came() -> None:
    near, far = pair()
    side = attention_side(near)
    assert side.complete
    assert side.missing_s == 0
    side.send(1, 0, 0, torch.ones(ROWS, WIDTH))
    far.close()
    with pytest.raises(PeerLost):
        side.receive(0)
    side.abandon()
    assert side.missing_s >= TIMEOUT_S
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"no worker holds it"):  # it has been waited for already: this request ends at once
        side.send(2, 0, 0, torch.ones(ROWS, WIDTH))
    assert time.monotonic() - start < TIMEOUT_S
    side.add_link(0, pair()[0])
    assert side.missing_s == 0
    side.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h._replace(kind=Kind.A2F),
        lambda h: h._replace(ubatch=7),
        lambda h: h._replace(dtype=2),
        lambda h: h._replace(rows=ROWS + 1),
        lambda h: h._replace(num_bytes=h.num_bytes - 4),
    ],
)
def test_an_ffn_worker_that_answers_nonsense_is_dropped_and_named(change: Callable[[Header], Header]) -> None:
    near, far = pair()
    side = attention_side(near)
    side.send(1, 0, 0, torch.ones(ROWS, WIDTH))
    answer(far, change)
    with pytest.raises(PeerLost, match="test/ffn/0"):
        side.receive(0)
    assert isinstance(side.losses[0], CorruptMessage)
    assert side.losses[0].peer == FFN


def test_rows_that_were_given_up_do_not_cost_the_link() -> None:
    near, far = pair()
    side = attention_side(near)
    rows = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    for ubatch in (0, 1):
        side.send(1, 0, ubatch, rows)
    side.abandon()

    def answers() -> None:
        while (message := far.poll()) is not None:
            slot = far.acquire()
            assert slot is not None, "the attention side left no room for what it asked"
            size = ROWS * WIDTH * 4
            slot.data[:size].copy_(message.data)
            step, ubatch = int.from_bytes(message.header[16:24], "little"), int.from_bytes(message.header[26:28], "little")
            far.release(message)
            header = Header(kind=Kind.F2A, epoch=1, step=step, layer=0, ubatch=ubatch, dtype=1, rows=ROWS, num_bytes=size)
            far.commit(slot, header.pack(), size)

    answers()
    near.on_poll = answers
    for step in range(2, 6):
        for ubatch in (0, 1):
            side.send(step, 0, ubatch, rows + step)
        for ubatch in (0, 1):
            assert torch.equal(side.receive(ubatch), rows + step)
    assert not side.losses
    side.rest()
    assert side.num_free_slots == 3


def test_an_answer_stays_readable_until_the_next_rows_of_its_ubatch_leave() -> None:
    near, far = pair()
    side = attention_side(near)
    first, second = torch.full((ROWS, WIDTH), 3.0), torch.full((ROWS, WIDTH), 4.0)
    side.send(1, 0, 0, first)
    answer(far)
    got = side.receive(0)
    side.send(1, 0, 1, second)
    answer(far, lambda h: h._replace(ubatch=1))
    assert torch.equal(side.receive(1), second)
    assert torch.equal(got, first)
    assert near.num_free_slots == 3
    assert far.num_free_slots == 1, "two answers are still in use"
    side.rest()
    assert far.num_free_slots == 3


def test_an_attention_worker_that_does_not_take_its_answers_is_dropped_and_named() -> None:
    near, far = pair(num_slots=1)
    side = ffn_side(far)
    for step in (1, 2):
        slot = near.acquire()
        assert slot is not None
        size = ROWS * WIDTH * 4
        header = Header(kind=Kind.A2F, epoch=1, step=step, layer=0, dtype=1, rows=ROWS, num_bytes=size)
        near.commit(slot, header.pack(), size)
        (work,) = side.poll()
        taken = side.reply(work, work.rows_RD, compute_us=1, wait_us=1, batch_rows=ROWS)
        assert taken == (step == 1)
    error = side.refusals[-1]
    assert isinstance(error, PeerLost)
    assert error.peer == ATTENTION
    assert "left no slot free" in str(error)
    assert side.num_peers == 0


def test_a_lost_spare_replica_is_noticed_between_steps() -> None:
    near, far = pair()
    spare_near, spare_far = pair(ffn=WorkerId("test/ffn/1"))
    side = attention_side(near)
    side.add_link(0, spare_near)
    assert side.complete
    assert len(side.peers()) == 2
    spare_far.close()
    side.rest()
    assert side.peers() == {(FFN, Epoch(1))}
    far.close()


def test_a_replica_that_joins_while_rows_are_away_changes_nothing_for_them() -> None:
    near, far = pair(ffn=WorkerId("test/ffn/1"))
    side = attention_side(near)
    rows = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    side.send(1, 0, 0, rows)
    joined_near, joined_far = pair(ffn=FFN)  # comes first in the order of names
    side.add_link(0, joined_near)
    side.send(1, 0, 1, rows)
    answer(far)
    answer(far, lambda h: h._replace(ubatch=1))
    assert torch.equal(side.receive(0), rows)
    assert torch.equal(side.receive(1), rows)
    side.send(2, 0, 0, rows)
    answer(joined_far, lambda h: h._replace(step=2))
    assert torch.equal(side.receive(0), rows)
    assert not side.losses
    assert side.times.num_resent == 0


def test_a_worker_that_comes_back_takes_the_rows_of_its_dead_self() -> None:
    near, far = pair()
    side = attention_side(near)
    rows = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    for ubatch in (0, 1):
        side.send(1, 0, ubatch, rows)
    far.close()
    again_near, again_far = pair()
    side.add_link(0, again_near)

    def answers() -> None:
        for ubatch in (0, 1):
            if again_far.pending():
                answer(again_far, lambda h, ubatch=ubatch: h._replace(ubatch=ubatch))  # type: ignore[misc]

    again_near.on_poll = answers
    assert torch.equal(side.receive(0), rows)
    assert torch.equal(side.receive(1), rows)
    assert side.times.num_resent == 2


@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_loss_that_shows_while_rows_are_sent_sends_the_others_rows_again_too(num_lost: int) -> None:
    """The worker has the rows of one ubatch and is found dead at the next one's: whoever is next gets both, once."""
    links = [pair(ffn=WorkerId(f"test/ffn/{n}")) for n in range(num_lost + 1)]
    side = attention_side(links[0][0], num_ubatches=3)
    for near, _ in links[1:]:
        side.add_link(0, near)
    rows = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    for ubatch in (0, 1):
        side.send(1, 0, ubatch, rows + ubatch)
    for _, far in links[:-1]:
        far.close()
    side.send(1, 0, 2, rows + 2)
    assert sorted(answer(links[-1][1]) for _ in range(3)) == [0, 1, 2]
    assert not links[-1][1].pending()
    for ubatch in range(3):
        assert torch.equal(side.receive(ubatch), rows + ubatch)
    assert len(side.losses) == num_lost
    assert side.times.num_resent == 2
