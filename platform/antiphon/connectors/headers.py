"""The fixed binary headers of the data plane: 64 bytes before every message (hot). Nothing is guessed, nothing is pickled.

    0   magic u32 · version u16 · kind u16 · epoch u64
    16  step u64 · layer u16 · ubatch u16 · dtype u8 · flags u8 · experts_per_row u16
    32  rows u32 · num_bytes u32 · wait_us u32 · compute_us u32 · batch_rows u32
    52  first u32 · spare u32 · crc32 of bytes 0..59

All little-endian. A header that fails any check is CorruptMessage, naming the peer. Must not know: links.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import NamedTuple

import torch

from antiphon.core.errors import CorruptMessage
from antiphon.transport.base import HEADER_BYTES, MAGIC, PROTOCOL_VERSION

_STRUCT = struct.Struct("<IHHQQHHBBHIIIIIII")
_CRC = struct.Struct("<I")
assert _STRUCT.size + _CRC.size == HEADER_BYTES


class Kind(enum.IntEnum):
    """What a message is."""

    A2F = 1  # rows for the FFN half of a layer
    F2A = 2  # their result
    PREFILL = 16  # decode asks prefill for KV
    PREFILL_ABORT = 17  # and wants it no longer
    KV = 18  # KV of some tokens in one layer
    KV_DONE = 19  # all KV is sent
    KV_FAILED = 20  # none will come; the payload says why
    STATE = 21  # a part of one layer's state behind the last token asked for


WIRE_DTYPES: dict[torch.dtype, int] = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}
TORCH_OF_WIRE = {code: dtype for dtype, code in WIRE_DTYPES.items()}
_KINDS = {int(kind): kind for kind in Kind}


class Header(NamedTuple):
    """The fields of one message, in the order of the wire; which ones mean something depends on its kind.

    A named tuple, because it is made and taken apart four times per layer: a frozen dataclass takes ten times as long.
    """

    kind: Kind
    epoch: int
    step: int = 0  # A2F, F2A: the sender's step; KV kinds: the transfer's id
    layer: int = 0
    ubatch: int = 0  # STATE: the plane
    dtype: int = 0
    flags: int = 0
    experts_per_row: int = 0
    rows: int = 0  # A2F, F2A: rows; KV kinds: tokens
    num_bytes: int = 0
    wait_us: int = 0  # F2A: from arrival to the start of its batch
    compute_us: int = 0  # F2A: of its batch
    batch_rows: int = 0  # F2A: rows computed together
    first: int = 0  # KV kinds: first token; STATE: first byte in the plane
    spare: int = 0  # A2F: number of the expert placement; PREFILL: deadline in milliseconds

    def pack(self) -> bytes:
        """The 64 bytes."""
        body = _STRUCT.pack(MAGIC, PROTOCOL_VERSION, *self)
        return body + _CRC.pack(zlib.crc32(body))


def unpack(data: bytes | bytearray | memoryview, peer: str) -> Header:
    """The header in ``data``.

    Raises:
        CorruptMessage: wrong magic, version, kind or checksum.
    """
    if len(data) != HEADER_BYTES:
        raise CorruptMessage(peer, f"a header of {len(data)} bytes")
    values = _STRUCT.unpack_from(data)
    if values[0] != MAGIC:
        raise CorruptMessage(peer, f"magic {values[0]:#x}")
    if values[1] != PROTOCOL_VERSION:
        raise CorruptMessage(peer, f"protocol version {values[1]}, ours is {PROTOCOL_VERSION}")
    if _CRC.unpack_from(data, _STRUCT.size)[0] != zlib.crc32(data[: _STRUCT.size]):
        raise CorruptMessage(peer, "header checksum")
    kind = _KINDS.get(values[2])
    if kind is None:
        raise CorruptMessage(peer, f"unknown kind {values[2]}")
    return Header(kind, *values[3:])
