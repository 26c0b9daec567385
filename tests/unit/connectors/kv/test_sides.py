"""Both ends of a hand-off against a peer that says too much, too little, or the same again."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, cast

import pytest
import torch

from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.connectors.kv import prefill_side
from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.handoff import NUM_SLOTS, kv_slot_bytes, request_slot_bytes
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.kv import KVLayout, KVLoad, KVPlane, StatePlane
from antiphon.core.request import RequestId
from antiphon.core.step import KVEvents
from antiphon.models.attention.kv_cache import KVCache
from antiphon.transport.base import Hello, Link, LinkLayout
from antiphon.transport.loopback import LoopbackTransport
from antiphon.worker.kv_roles import ReceivesKV

DECODES, PREFILLS = WorkerId("d/decode/0"), WorkerId("d/prefill/0")
LAYOUT = KVLayout(
    num_layers=3,
    planes=(KVPlane(name="k", num_heads=1, head_dim=4), KVPlane(name="v", num_heads=1, head_dim=4)),
    block_size_tokens=4,
    dtype="float32",
    itemsize_bytes=4,
    states=(StatePlane(name="s", shape=(8,), dtype="float32", itemsize_bytes=4),),
    state_layers=(2,),
)
TOKENS = 6


def cache() -> KVCache:
    return KVCache(LAYOUT, 8, torch.device("cpu"), num_state_slots=2)


def linked(side: DecodeSide | PrefillSide) -> Link:
    """The other end of a link that ``side`` has."""
    is_decode = isinstance(side, DecodeSide)
    asks, gives = request_slot_bytes(64), kv_slot_bytes(LAYOUT)

    def hello(worker: WorkerId, sends: int, receives: int) -> Hello:
        layout = LinkLayout(channel="kv", num_slots=NUM_SLOTS, send_slot_bytes=sends, recv_slot_bytes=receives, fields=())
        return Hello(worker_id=worker, epoch=Epoch(1), layout=layout)

    transport = LoopbackTransport()
    mine, others = hello(DECODES, asks, gives), hello(PREFILLS, gives, asks)
    listener = transport.listen("x", lambda _: others)
    decodes = transport.connect(listener.address, mine, 5.0)
    prefills = listener.accept()
    assert prefills is not None
    side.add_link(decodes if is_decode else prefills)
    return prefills if is_decode else decodes


def say(link: Link, header: Header, data: bytes = b"") -> None:
    slot = link.acquire()
    assert slot is not None
    if data:
        slot.data[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    link.commit(slot, header.pack(), len(data))


def heard(link: Link) -> list[Header]:
    found = []
    while (message := link.poll()) is not None:
        found.append(unpack(message.header, link.peer))
        link.release(message)
    return found


def kv(layer: int, first: int, rows: int) -> tuple[Header, bytes]:
    data = bytes([layer + 1]) * (rows * LAYOUT.layer_token_bytes)
    return Header(kind=Kind.KV, epoch=1, step=1, layer=layer, rows=rows, num_bytes=len(data), first=first), data


def state(first: int, size: int) -> tuple[Header, bytes]:
    return Header(kind=Kind.STATE, epoch=1, step=1, layer=2, num_bytes=size, first=first), b"\1" * size


DONE = (Header(kind=Kind.KV_DONE, epoch=1, step=1), b"")
WHOLE = [kv(0, 0, 3), kv(1, 0, TOKENS), kv(0, 3, 3), state(0, 20), state(20, 12)]


def fetched(messages: list[tuple[Header, bytes]]) -> KVEvents:
    """What came of a hand-off that consists of these."""
    side = DecodeSide(epoch=Epoch(1), cache=cache())
    link = linked(side)
    load = KVLoad(
        request_id=RequestId("r"),
        prefill_worker=PREFILLS,
        token_ids=tuple(range(TOKENS)),
        first_token=0,
        num_tokens=TOKENS,
        block_ids=(0, 1),
        deadline_s=30.0,
        state_slot=1,
    )
    side.start(load)
    assert [header.kind for header in heard(link)] == [Kind.PREFILL]
    loaded: list[RequestId] = []
    failed: list[tuple[RequestId, str]] = []
    for header, data in messages:
        say(link, header, data)
        events = side.poll()
        loaded += events.loaded
        failed += events.failed
        if failed:
            break  # its link may be gone
        heard(link)
    return KVEvents(loaded=tuple(loaded), failed=tuple(failed))


@pytest.mark.parametrize("seed", range(5))
def test_what_came_in_any_order_and_more_than_once_is_whole(seed: int) -> None:
    """A prefill worker that gave a request's place away and came back to it sends from the beginning again."""
    chance = random.Random(seed)
    rows = WHOLE[:3] + chance.choices(WHOLE[:3], k=5)
    chance.shuffle(rows)
    rows = WHOLE[:3] + rows + [state(0, 20), state(0, 32), state(8, 24)]
    assert fetched([*rows, DONE]).loaded == ("r",)


@pytest.mark.parametrize(
    "instead",
    [
        [kv(0, 0, 3), kv(0, 0, 3), kv(1, 0, TOKENS), state(0, 32)],
        [kv(0, 0, TOKENS), kv(0, 0, TOKENS), state(0, 32)],
        [kv(0, 0, TOKENS), kv(1, 0, 5), kv(1, 4, 1), state(0, 32)],
        [kv(0, 0, TOKENS), kv(1, 0, TOKENS), state(0, 16), state(0, 16)],
        [kv(0, 0, TOKENS), kv(1, 0, TOKENS), state(16, 16), state(16, 16)],
        [],
    ],
    ids=["rows twice", "a layer twice", "a row twice", "half a state twice", "a state's end twice", "nothing"],
)
def test_what_came_twice_stands_for_nothing_that_did_not_come(instead: list[tuple[Header, bytes]]) -> None:
    """Else the request would go on over rows that nobody has computed."""
    events = fetched([*instead, DONE])
    assert not events.loaded
    assert [request_id for request_id, _ in events.failed] == ["r"]


def ask(link: Link, transfer: int, lease_ms: int = 1000) -> None:
    tokens = torch.arange(5, dtype=torch.int32).numpy().tobytes()
    header = Header(kind=Kind.PREFILL, epoch=1, step=transfer, rows=5, num_bytes=len(tokens), spare=lease_ms)
    say(link, header, tokens)


def test_a_transfer_that_is_asked_for_twice_costs_its_asker_its_link() -> None:
    """The second would take the first one's place while the engine computes it."""
    side = PrefillSide(epoch=Epoch(1), cache=cache())
    link = linked(side)
    ask(link, 7)
    assert len(side.poll().arrived) == 1
    ask(link, 7)
    events = side.poll()
    assert not events.arrived
    assert len(events.aborted) == 1
    assert (side.num_peers, side.num_transfers) == (0, 0)


def test_who_asks_on_and_takes_nothing_is_left_with_what_it_owes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_side, "_MAX_OWED", 50)
    side = PrefillSide(epoch=Epoch(1), cache=cache())
    link = linked(side)
    refused = 0
    for number in range(1, 500):
        if not side.num_peers:
            break
        ask(link, number)
        for request in side.poll().arrived:
            side.forget(request.request_id, "too many")  # the engine's queue is full; the answers are never taken
            refused += 1
    assert not side.num_peers
    assert 50 <= refused <= 60


def test_no_lease_is_longer_than_an_hour() -> None:
    side = PrefillSide(epoch=Epoch(1), cache=cache(), clock=lambda: 100.0)
    link = linked(side)
    ask(link, 1, lease_ms=2**32 - 1)
    (request,) = side.poll().arrived
    assert request.deadline_s is not None
    assert request.deadline_s <= 3700.0


def test_a_prompt_of_more_messages_than_a_link_has_slots_comes_within_one_step() -> None:
    """Between steps alone it came eight messages at a time: behind slow steps a prompt waited for seconds, whoever computed it."""
    side = DecodeSide(epoch=Epoch(1), cache=cache())
    link = linked(side)
    role = ReceivesKV(side)
    load = KVLoad(
        request_id=RequestId("r"),
        prefill_worker=PREFILLS,
        token_ids=tuple(range(TOKENS)),
        first_token=0,
        num_tokens=TOKENS,
        block_ids=(0, 1),
        deadline_s=30.0,
        state_slot=1,
    )
    assert not role.is_worth_it([])
    side.start(load)
    heard(link)
    messages = deque([kv(layer, token, 1) for layer in (0, 1) for token in range(TOKENS)] + [state(0, 32), DONE])
    assert len(messages) > NUM_SLOTS
    for layer in range(LAYOUT.num_layers):  # of a step of other requests
        while messages and (slot := link.acquire()) is not None:
            header, data = messages.popleft()
            slot.data[: len(data)].copy_(torch.frombuffer(bytearray(data or b"0"), dtype=torch.uint8)[: len(data)])
            link.commit(slot, header.pack(), len(data))
        if role.is_worth_it([]):
            role.offer(layer, [], [], cast(Any, None))
    assert not messages
    assert not role.is_worth_it([]), "all is there: layers are left alone again"
    assert role.poll().loaded == (RequestId("r"),)
