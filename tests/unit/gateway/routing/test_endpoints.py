"""Which gateway replica a conversation meets."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from antiphon.gateway.routing.endpoints import EndpointBoard, key_of, rank_endpoints

THREE = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")


def chat(*texts: str, **fields: object) -> bytes:
    roles = ("system", "user", "assistant")
    messages = [{"role": roles[i % 3], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_a_conversation_keeps_its_name_as_it_grows_and_however_its_fields_are_sorted() -> None:
    first = key_of(chat("be brief", "hello"))
    assert key_of(chat("be brief", "hello", "hi", "how are you?", temperature=0.5)) == first
    assert key_of(json.dumps(dict(reversed(json.loads(chat("be brief", "hello")).items()))).encode()) == first
    assert key_of(chat("be brief", "goodbye")) != first


@given(body=st.binary(max_size=200))
def test_every_body_has_a_key(body: bytes) -> None:
    assert isinstance(key_of(body), str)


def test_a_replica_that_comes_or_goes_moves_only_its_own_share() -> None:
    before = {str(key): rank_endpoints(str(key), THREE, {})[0] for key in range(300)}
    assert all(60 < count < 140 for count in Counter(before.values()).values())
    after = {key: rank_endpoints(key, THREE[:2], {})[0] for key in before}
    assert all(after[key] == endpoint for key, endpoint in before.items() if endpoint != THREE[2])


def test_a_replica_with_far_more_than_its_part_comes_last() -> None:
    board = EndpointBoard()
    favourite = board.rank("k", THREE)[0]
    with board.count(favourite), board.count(favourite):
        assert board.rank("k", THREE)[-1] == favourite
        assert set(board.rank("k", THREE)) == set(THREE)
    assert board.rank("k", THREE)[0] == favourite
