"""Where everything lies in the memory two ends share (pure arithmetic, control).

    page 0   magic, version, num_slots, slot bytes of both directions; two sleep words, each on a cache line of its own
    then     per direction: entries [num_slots x 64], returns [num_slots x 8], headers [num_slots x 64]
    then     per direction: slots [num_slots x stride], page-aligned, the stride a multiple of 64

Slots may lie in a region of their own instead, page-aligned from its start, four words for each slot behind them (``card_slots``).
Direction 0 goes from the connecting end to the listening one. Must not know: how the memory is shared.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from antiphon.transport.base import HEADER_BYTES, PROTOCOL_VERSION, LinkLayout

PAGE_BYTES = 4096
ENTRY_BYTES = 64
FLAG_BYTES = 8
_LINE_BYTES = 64
_SLEEP_AT = (128, 192)
_PREFIX = struct.Struct("<QIIQQ")
_MAGIC = 0x4D48534E41  # "ANSHM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """Byte offsets of one direction's parts, and the size of its slots."""

    entries: int
    returns: int
    headers: int
    slots: int
    slot_bytes: int
    stride_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The whole segment; ``directions[0]`` is written by the connecting end."""

    num_slots: int
    directions: tuple[Direction, Direction]
    sleep: tuple[int, int]  # sleep words of the connecting and of the listening end
    num_bytes: int
    region_bytes: int  # of the slots' own region; 0 where they lie in the segment
    flags_at: int  # in that region, behind the slots

    @classmethod
    def of(cls, layout: LinkLayout, *, connecting: bool, apart: bool = False) -> Segment:
        """The segment for ``layout`` as seen from one end. ``apart``: slots lie in a region of their own."""
        sizes = (layout.send_slot_bytes, layout.recv_slot_bytes)
        if not connecting:
            sizes = sizes[::-1]
        num_slots, at = layout.num_slots, PAGE_BYTES
        small = []
        for _ in sizes:
            entries = at
            returns = entries + num_slots * ENTRY_BYTES
            headers = _up(returns + num_slots * 8, _LINE_BYTES)
            at = headers + num_slots * HEADER_BYTES
            small.append((entries, returns, headers))
        control_bytes = _up(at, PAGE_BYTES)
        at = 0 if apart else at
        directions = []
        for (entries, returns, headers), slot_bytes in zip(small, sizes, strict=True):
            slots, stride = _up(at, PAGE_BYTES), _up(slot_bytes, _LINE_BYTES)
            at = slots + num_slots * stride
            directions.append(
                Direction(
                    entries=entries,
                    returns=returns,
                    headers=headers,
                    slots=slots,
                    slot_bytes=slot_bytes,
                    stride_bytes=stride,
                )
            )
        return cls(
            num_slots=num_slots,
            directions=(directions[0], directions[1]),
            sleep=_SLEEP_AT,
            num_bytes=control_bytes if apart else _up(at, PAGE_BYTES),
            region_bytes=_up(at, PAGE_BYTES) + _up(4 * num_slots * FLAG_BYTES, PAGE_BYTES) if apart else 0,
            flags_at=_up(at, PAGE_BYTES) if apart else 0,
        )

    def prefix(self) -> bytes:
        """What page 0 starts with, once the segment is ready."""
        first, second = self.directions
        return _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, self.num_slots, first.slot_bytes, second.slot_bytes)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
