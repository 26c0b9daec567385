import json
import struct

import pytest

from antiphon.core.errors import CorruptMessage, LayoutMismatch, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.connect.hello import HELLO_VERSION, Greeting, decode_greeting, encode_greeting, encode_refusal

GREETING = Greeting(
    hello=Hello(
        worker_id=WorkerId("llm/ffn/0"),
        epoch=Epoch(9),
        layout=LinkLayout(
            channel="kv", num_slots=4, send_slot_bytes=0, recv_slot_bytes=1 << 33, fields=(("model", "é"), ("dtype", "x"))
        ),
    ),
    attachment=b"\0\1\2",
)


def frame(text: object, *, magic: int = 0x48544E41, version: int = HELLO_VERSION, kind: int = 1) -> bytes:
    body = json.dumps(text).encode()
    return struct.pack("<IHHII", magic, version, kind, len(body), 0) + body


def valid() -> dict[str, object]:
    return {
        "worker_id": "w",
        "epoch": 1,
        "channel": "afd",
        "num_slots": 2,
        "send_slot_bytes": 1,
        "recv_slot_bytes": 1,
        "fields": [["a", "b"]],
    }


def test_a_greeting_survives_the_wire() -> None:
    assert decode_greeting(encode_greeting(GREETING), "p") == GREETING


def test_a_refusal_arrives_as_the_error_it_was() -> None:
    with pytest.raises(LayoutMismatch, match="model a against b") as caught:
        decode_greeting(encode_refusal(LayoutMismatch("x", ["model a against b"])), "llm/ffn/1")
    assert caught.value.peer == "llm/ffn/1"
    with pytest.raises(Unavailable, match="draining"):
        decode_greeting(encode_refusal(Unavailable("draining")), "p")


def test_another_protocol_version_is_a_layout_mismatch() -> None:
    with pytest.raises(LayoutMismatch, match="protocol version"):
        decode_greeting(frame(valid(), version=HELLO_VERSION + 1), "p")


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": 3},
        {"epoch": -1},
        {"epoch": True},
        {"epoch": 1.5},
        {"num_slots": 0},
        {"num_slots": 1 << 20},
        {"send_slot_bytes": -1},
        {"recv_slot_bytes": "9"},
        {"fields": None},
        {"fields": [["a"]]},
        {"fields": [["a", 1]]},
        {"channel": None},
    ],
    ids=str,
)
def test_a_greeting_with_a_wrong_field_is_corrupt(change: dict[str, object]) -> None:
    with pytest.raises(CorruptMessage):
        decode_greeting(frame({**valid(), **change}), "p")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_greeting(GREETING)[:-1],
        encode_greeting(GREETING) + b"x",
        frame(valid(), magic=1),
        frame(valid(), kind=9),
        frame([1, 2]),
        struct.pack("<IHHII", 0x48544E41, HELLO_VERSION, 1, 2, 0) + b"\xff\xfe",
        struct.pack("<IHHII", 0x48544E41, HELLO_VERSION, 1, 1 << 31, 0),
    ],
)
def test_what_is_not_a_greeting_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptMessage):
        decode_greeting(data, "p")
