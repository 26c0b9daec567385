"""The greeting each end of a link sends first, as bytes, and the comparison of the two layouts (control).

    0        4         6      8        12            16
    ┌────────┬─────────┬──────┬────────┬─────────────┬───────────┬────────────┐
    │ magic  │ version │ kind │ length │ attachment  │ JSON text │ attachment │    little endian, lengths in bytes
    └────────┴─────────┴──────┴────────┴─────────────┴───────────┴────────────┘

Whoever sends one has proven itself before (``proof``; over gRPC by its certificate); what arrives is checked field by field all the
same. Must not know: how the bytes travel.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from antiphon.core.errors import AntiphonError, CorruptMessage, LayoutMismatch, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.text.json_text import read_json_text
from antiphon.transport.base import Hello, LinkLayout

_PREFIX = struct.Struct("<IHHII")  # magic, version, kind, length of the text, length of the attachment
PREFIX_BYTES = _PREFIX.size
MAGIC = 0x48544E41  # "ANTH"
HELLO_VERSION = 2  # of the hello alone; the data plane's headers have their own
_HELLO, _REFUSAL = 1, 2
_MAX_TEXT_BYTES = 1 << 20
_MAX_ATTACHMENT_BYTES = 1 << 24
_MAX_SLOTS = 1 << 15
_MAX_SLOT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """A hello and the bytes a transport sends with it (descriptors of its memory)."""

    hello: Hello
    attachment: bytes = b""


def check_layouts(mine: Hello, theirs: Hello) -> None:
    """Raise LayoutMismatch, seen from this end, unless the two fit."""
    if differences := mine.layout.differences(theirs.layout):
        raise LayoutMismatch(theirs.worker_id, differences)


def encode_greeting(greeting: Greeting) -> bytes:
    """The greeting as one frame."""
    hello, layout = greeting.hello, greeting.hello.layout
    text = {
        "worker_id": hello.worker_id,
        "epoch": hello.epoch,
        "channel": layout.channel,
        "num_slots": layout.num_slots,
        "send_slot_bytes": layout.send_slot_bytes,
        "recv_slot_bytes": layout.recv_slot_bytes,
        "fields": layout.fields,
        "memory": layout.memory,
    }
    return _frame(_HELLO, text, greeting.attachment)


def encode_refusal(error: AntiphonError) -> bytes:
    """Why a peer is turned away, as one frame."""
    differences = error.differences if isinstance(error, LayoutMismatch) else ()
    return _frame(_REFUSAL, {"code": error.code, "message": str(error), "differences": differences}, b"")


def decode_greeting(frame: bytes, peer: str) -> Greeting:
    """The greeting in ``frame`` from ``peer`` (a name for errors).

    Raises:
        LayoutMismatch, Unavailable: the frame is a refusal.
        CorruptMessage: it is nothing of ours, or not whole.
    """
    kind, text_bytes, attachment_bytes = _parse_prefix(frame, peer)
    end = _PREFIX.size + text_bytes
    if len(frame) != end + attachment_bytes:
        raise CorruptMessage(peer, f"a greeting of {len(frame)} bytes instead of {end + attachment_bytes}")
    try:
        text = read_json_text(bytes(frame[_PREFIX.size : end]), unique_keys=True)
    except ValueError as error:
        raise CorruptMessage(peer, f"greeting is not JSON: {error}") from None
    if not isinstance(text, dict):
        raise CorruptMessage(peer, "greeting is not a JSON object")
    if kind == _REFUSAL:
        raise _refusal(text, peer)
    return Greeting(hello=_hello(text, peer), attachment=bytes(frame[end:]))


def frame_bytes(prefix: bytes, peer: str) -> int:
    """How many bytes follow a frame's first ``PREFIX_BYTES``. Raises CorruptMessage, LayoutMismatch."""
    _, text_bytes, attachment_bytes = _parse_prefix(prefix, peer)
    return text_bytes + attachment_bytes


def send_frame(sock: socket.socket, frame: bytes, peer: str, deadline: float) -> None:
    """Write ``frame`` before ``deadline`` (time.monotonic). Raises PeerLost."""
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.sendall(frame)
    except OSError as error:
        raise PeerLost(peer, f"it took no greeting: {error}") from error


def receive_exactly(sock: socket.socket, num_bytes: int, peer: str, deadline: float) -> bytes:
    """Read so many bytes of a stream socket before ``deadline`` (time.monotonic). Raises PeerLost."""
    parts = bytearray()
    while len(parts) < num_bytes:
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            part = sock.recv(num_bytes - len(parts))
        except OSError as error:
            raise PeerLost(peer, f"no greeting came: {error}") from error
        if not part:
            raise PeerLost(peer, "it closed the connection before its greeting was complete")
        parts += part
    return bytes(parts)


def _frame(kind: int, text: dict[str, Any], attachment: bytes) -> bytes:
    body = json.dumps(text).encode()
    return _PREFIX.pack(MAGIC, HELLO_VERSION, kind, len(body), len(attachment)) + body + attachment


def _parse_prefix(frame: bytes, peer: str) -> tuple[int, int, int]:
    if len(frame) < _PREFIX.size:
        raise CorruptMessage(peer, f"a greeting of {len(frame)} bytes")
    magic, version, kind, text_bytes, attachment_bytes = _PREFIX.unpack_from(frame)
    if magic != MAGIC:
        raise CorruptMessage(peer, f"greeting starts with {magic:#x}")
    if version != HELLO_VERSION:
        raise LayoutMismatch(peer, [f"protocol version {HELLO_VERSION} against {version}"])
    if kind not in (_HELLO, _REFUSAL) or text_bytes > _MAX_TEXT_BYTES or attachment_bytes > _MAX_ATTACHMENT_BYTES:
        raise CorruptMessage(peer, f"greeting of kind {kind} with {text_bytes} + {attachment_bytes} bytes")
    return kind, text_bytes, attachment_bytes


def _refusal(text: dict[str, Any], peer: str) -> AntiphonError:
    differences = text.get("differences")
    if text.get("code") == LayoutMismatch.code and isinstance(differences, list):
        return LayoutMismatch(peer, [str(d) for d in differences])
    return Unavailable(f"{peer} refused the link: {text.get('message')}")


def _hello(text: dict[str, Any], peer: str) -> Hello:
    def string(name: str) -> str:
        value = text.get(name)
        if not isinstance(value, str):
            raise CorruptMessage(peer, f"greeting has {name} {value!r}")
        return value

    def integer(name: str, low: int, high: int) -> int:
        value = text.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CorruptMessage(peer, f"greeting has {name} {value!r}")
        return value

    fields = text.get("fields")
    if not isinstance(fields, list) or not all(
        isinstance(f, list) and len(f) == 2 and all(isinstance(x, str) for x in f) for f in fields
    ):
        raise CorruptMessage(peer, "greeting's fields are not pairs of strings")
    return Hello(
        worker_id=WorkerId(string("worker_id")),
        epoch=Epoch(integer("epoch", 0, (1 << 63) - 1)),
        layout=LinkLayout(
            channel=string("channel"),
            num_slots=integer("num_slots", 1, _MAX_SLOTS),
            send_slot_bytes=integer("send_slot_bytes", 0, _MAX_SLOT_BYTES),
            recv_slot_bytes=integer("recv_slot_bytes", 0, _MAX_SLOT_BYTES),
            fields=tuple((name, value) for name, value in fields),
            memory=string("memory") if "memory" in text else "",  # workers of versions before this field have none to offer
        ),
    )
