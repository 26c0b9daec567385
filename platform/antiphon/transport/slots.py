"""Preallocated slots and messages over memory that a link owns, with no allocation per message (hot).

Must not know: how the memory reaches the peer.
"""

from __future__ import annotations

import mmap

import torch

from antiphon.transport.base import HEADER_BYTES, Message, Slot

_EMPTY = torch.empty(0, dtype=torch.uint8)


def byte_rows(
    buffer: bytearray | memoryview | mmap.mmap, num_rows: int, offset: int = 0, row_bytes: int | None = None
) -> torch.Tensor:
    """A view of writable ``buffer`` from ``offset`` as uint8 [num_rows, row_bytes]; by default all of it in equal rows."""
    if row_bytes is None:
        row_bytes = (len(buffer) - offset) // num_rows
    if row_bytes == 0:
        return torch.empty(num_rows, 0, dtype=torch.uint8)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=num_rows * row_bytes, offset=offset)
    return flat.view(num_rows, row_bytes)


def slots_of(memory: torch.Tensor) -> list[Slot]:
    """One ``Slot`` for each row of ``memory``, uint8 [num_slots, slot_bytes]."""
    return [Slot(index=i, data=memory[i]) for i in range(memory.shape[0])]


class MessageViews:
    """One reusable ``Message`` per slot. A view of the same length as last time is used again, not made again."""

    __slots__ = ("_messages", "_rows")

    def __init__(self, memory: torch.Tensor, headers: memoryview) -> None:
        """``memory`` is uint8 [num_slots, slot_bytes], ``headers`` num_slots x HEADER_BYTES writable bytes or read-only."""
        self._rows = [memory[i] for i in range(memory.shape[0])]
        self._messages = [
            Message(slot=i, header=headers[i * HEADER_BYTES : (i + 1) * HEADER_BYTES], data=_EMPTY) for i in range(memory.shape[0])
        ]

    def view(self, slot: int, num_bytes: int) -> Message:
        """The message of ``slot`` with ``data`` uint8 [num_bytes]."""
        message = self._messages[slot]
        if message.data.shape[0] != num_bytes:
            message.data = self._rows[slot][:num_bytes]
        return message
