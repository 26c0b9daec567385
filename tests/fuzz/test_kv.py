"""Both ends of a KV hand-off: whatever a peer says, it is dropped or the hand-off ends, and no other request's KV is touched.

Briefly in ``make test``; ``make fuzz`` sets ANTIPHON_FUZZ_EXAMPLES and runs them at length.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from antiphon.connectors.headers import Header, Kind
from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.handoff import NUM_SLOTS, kv_slot_bytes, request_slot_bytes
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.kv import KVLayout, KVLoad, KVPlane, StatePlane
from antiphon.core.request import RequestId
from antiphon.models.attention.kv_cache import KVCache
from antiphon.transport.base import Hello, Link, LinkLayout
from antiphon.transport.loopback import loopback_pair

from .damage import damaged, fuzz

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
TOKENS, MAX_MODEL_LEN = 6, 64
BLOCKS, STATE_SLOT = (0, 1), 1
OTHERS = 7.0  # what lies in the cache of requests that this hand-off is not about


def links() -> tuple[Link, Link]:
    """The decode worker's end and the prefill worker's."""
    asks, gives = request_slot_bytes(MAX_MODEL_LEN), kv_slot_bytes(LAYOUT)

    def hello(worker: WorkerId, sends: int, receives: int) -> Hello:
        layout = LinkLayout(channel="kv", num_slots=NUM_SLOTS, send_slot_bytes=sends, recv_slot_bytes=receives, fields=())
        return Hello(worker_id=worker, epoch=Epoch(1), layout=layout)

    return loopback_pair(hello(DECODES, asks, gives), hello(PREFILLS, gives, asks))


def filled_cache() -> KVCache:
    cache = KVCache(LAYOUT, 8, torch.device("cpu"), num_state_slots=3)
    for tensor in tensors_of(cache):
        tensor.fill_(OTHERS)
    return cache


def tensors_of(cache: KVCache) -> list[torch.Tensor]:
    """Everything that it keeps; the first axis is the token or the state."""
    return [tensor for layer in (*cache.planes, *cache.states) for tensor in layer]


def untouched(cache: KVCache) -> bool:
    """Whether nothing was written but the tokens and the state that the hand-off is about."""
    mine = cache.slots(BLOCKS, 0, TOKENS).tolist()
    for layer in cache.planes:
        for plane in layer:
            others = [number for number in range(plane.shape[0]) if number not in mine]
            if not bool((plane[others] == OTHERS).all()):
                return False
    return all(
        bool((plane[number] == OTHERS).all())
        for layer in cache.states
        for plane in layer
        for number in range(plane.shape[0])
        if number != STATE_SLOT
    )


def say(link: Link, header: Header, data: bytes) -> None:
    while (message := link.poll()) is not None:  # what the other end asked or sent
        link.release(message)
    slot = link.acquire()
    if slot is not None:
        slot.data[: len(data)].copy_(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)])
        link.commit(slot, header.pack(), len(data))


ROW = LAYOUT.layer_token_bytes
NUMBERS = st.sampled_from([0, 1, 2, 5, TOKENS, TOKENS + 1, 127, 2**31, 2**32 - 1])
GOOD: list[tuple[dict[str, Any], bytes]] = [
    ({"kind": Kind.KV, "layer": 0, "rows": TOKENS, "num_bytes": TOKENS * ROW}, b"\1" * TOKENS * ROW),
    ({"kind": Kind.KV, "layer": 1, "rows": TOKENS, "num_bytes": TOKENS * ROW}, b"\2" * TOKENS * ROW),
    ({"kind": Kind.STATE, "layer": 2, "num_bytes": 32}, b"\3" * 32),
    ({"kind": Kind.KV_DONE}, b""),
]
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(list(Kind)),
        "epoch": st.sampled_from([0, 1, 2, 2**64 - 1]),
        "step": st.sampled_from([0, 1, 2, 2**64 - 1]),
        "layer": st.sampled_from([0, 1, 2, 3, 65_535]),
        "ubatch": st.sampled_from([0, 1, 65_535]),
        "rows": NUMBERS,
        "num_bytes": NUMBERS | st.sampled_from([32, ROW, TOKENS * ROW]),
        "first": NUMBERS,
        "spare": NUMBERS,
    },
)
SAID = st.tuples(st.integers(0, len(GOOD) - 1), CHANGES | st.just({}), st.one_of(st.none(), st.binary(max_size=300)))


@fuzz
@given(said=st.lists(SAID, min_size=1, max_size=8))
def test_what_a_prefill_worker_sends(said: list[tuple[int, dict[str, Any], bytes | None]]) -> None:
    cache = filled_cache()
    side, (near, far) = DecodeSide(epoch=Epoch(1), cache=cache), links()
    side.add_link(near)
    load = KVLoad(
        request_id=RequestId("r"),
        prefill_worker=PREFILLS,
        token_ids=tuple(range(TOKENS)),
        first_token=0,
        num_tokens=TOKENS,
        block_ids=BLOCKS,
        deadline_s=30.0,
        state_slot=STATE_SLOT,
    )
    side.start(load)
    loaded: list[str] = []
    failed: list[str] = []
    for at, changes, payload in said:
        if not side.peers():
            break  # dropped
        fields, data = GOOD[at]
        data = data if payload is None else payload
        header = Header(**{"epoch": 1, "step": 1, **fields, **changes})
        say(far, header, data)
        events = side.poll()
        loaded += events.loaded
        failed += [request_id for request_id, _ in events.failed]
    assert len(loaded) + len(failed) == (0 if side.num_transfers else 1)
    if side.num_transfers:
        assert side.peers(), "its peer is gone, and it waits"
    assert untouched(cache), "another request's KV was written"
    side.close()
    far.close()


@fuzz
@given(order=st.permutations([0, 1, 2]), left_out=st.integers(0, 3))
def test_nothing_counts_as_whole_before_all_of_it_came(order: list[int], left_out: int) -> None:
    side, (near, far) = DecodeSide(epoch=Epoch(1), cache=filled_cache()), links()
    side.add_link(near)
    side.start(
        KVLoad(
            request_id=RequestId("r"),
            prefill_worker=PREFILLS,
            token_ids=tuple(range(TOKENS)),
            first_token=0,
            num_tokens=TOKENS,
            block_ids=BLOCKS,
            deadline_s=30.0,
            state_slot=STATE_SLOT,
        )
    )
    for at in [*(number for number in order if number != left_out), 3]:
        fields, data = GOOD[at]
        say(far, Header(**{"epoch": 1, "step": 1, **fields}), data)
        events = side.poll()
    assert bool(events.loaded) == (left_out == 3)
    side.close()
    far.close()


IDS = b"".join(number.to_bytes(4, "little") for number in range(1, TOKENS + 1))
ASKED = IDS + b"salt\x0000-1-2-3\0tenant"


@fuzz
@given(said=st.lists(st.tuples(CHANGES | st.just({}), damaged(ASKED) | st.just(ASKED)), min_size=1, max_size=8))
def test_what_a_decode_worker_asks(said: list[tuple[dict[str, Any], bytes]]) -> None:
    side, (far, near) = PrefillSide(epoch=Epoch(1), cache=filled_cache(), clock=lambda: 0.0), links()
    side.add_link(near)
    arrived: set[str] = set()
    over: set[str] = set()
    for number, (changes, data) in enumerate(said):
        data = data[: request_slot_bytes(MAX_MODEL_LEN)]
        fields = {"kind": Kind.PREFILL, "epoch": 1, "step": number, "rows": TOKENS, "num_bytes": len(data), "spare": 30_000}
        header = Header(**{**fields, **changes})
        if not side.num_peers:
            break
        say(far, header, data)
        events = side.poll()
        for request in events.arrived:
            target = events.targets[request.request_id]
            assert 0 < target.num_tokens <= len(request.prompt_token_ids) == header.rows
            assert 4 * len(request.prompt_token_ids) <= len(data)
            assert target.first_token + target.num_tokens == len(request.prompt_token_ids)
            assert request.deadline_s is not None
            assert request.deadline_s - request.arrival_s <= 3600.0
            arrived.add(request.request_id)
        over |= set(events.aborted) | set(events.sent)
    over |= set(side.poll().aborted)
    assert over <= arrived
    assert side.num_transfers == len(arrived - over)
    if not side.num_peers:
        assert arrived == over, "its asker is gone, and it computes on"
    side.close()
    far.close()
