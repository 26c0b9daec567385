"""Which slots are where, for links whose peer shares no memory: credits, sequence numbers, and what may not be (hot).

    data     ┌ kind ┬ slot ┬ seq ┬ num_bytes ┐ header
             └──u16─┴─u16──┴─u32─┴────u64────┘ 64 B        little endian; the payload travels as the transport likes
    credit   the same 16 bytes alone: the receiver gives ``slot`` back

Must not know: how frames travel, or where slots lie.
"""

from __future__ import annotations

import struct

from antiphon.transport.base import HEADER_BYTES

PREFIX = struct.Struct("<HHIQ")
DATA, CREDIT = 1, 2
FRAME_BYTES = PREFIX.size + HEADER_BYTES  # 80
_SEQ_MASK = 0xFFFFFFFF


class DamageError(Exception):
    """A frame that no honest peer sends; the link turns it into CorruptMessage."""


class Credits:
    """Both directions' slots as one end sees them."""

    __slots__ = ("_held", "_in_flight", "_num_slots", "_recv_seq", "_recv_slot_bytes", "_send_seq", "free")

    def __init__(self, num_slots: int, recv_slot_bytes: int) -> None:
        """All slots of this end are free."""
        self.free = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._recv_slot_bytes = recv_slot_bytes
        self._in_flight = [False] * num_slots
        self._held = [False] * num_slots
        self._send_seq = self._recv_seq = 0

    def send(self, slot: int, num_bytes: int) -> bytes:
        """The prefix of the message in ``slot``, which is in flight from now on."""
        self._in_flight[slot] = True
        prefix = PREFIX.pack(DATA, slot, self._send_seq, num_bytes)
        self._send_seq = (self._send_seq + 1) & _SEQ_MASK
        return prefix

    def receive(self, frame: bytes) -> tuple[int, int]:
        """(slot, num_bytes) of a data frame; the slot is held until ``release``. Raises DamageError."""
        if len(frame) < FRAME_BYTES:
            raise DamageError(f"a frame of {len(frame)} bytes")
        kind, slot, seq, num_bytes = PREFIX.unpack_from(frame)
        if kind != DATA or slot >= self._num_slots or seq != self._recv_seq:
            raise DamageError(f"kind {kind}, slot {slot}, sequence number {seq} instead of {self._recv_seq}")
        if num_bytes > self._recv_slot_bytes:
            raise DamageError(f"{num_bytes} bytes announced, {self._recv_slot_bytes} allowed")
        if self._held[slot]:
            raise DamageError(f"slot {slot} sent again before its release")
        self._held[slot] = True
        self._recv_seq = (seq + 1) & _SEQ_MASK
        return slot, num_bytes

    def release(self, slot: int) -> bytes:
        """The credit that gives ``slot`` back to the peer."""
        self._held[slot] = False
        return PREFIX.pack(CREDIT, slot, 0, 0)

    def take_credit(self, frame: bytes) -> int:
        """The slot that came back, which is neither in flight nor yet free. Raises DamageError."""
        slot: int = PREFIX.unpack(frame)[1] if len(frame) == PREFIX.size else self._num_slots
        if slot >= self._num_slots or not self._in_flight[slot]:
            raise DamageError(f"credit for slot {slot}, which is not in flight")
        self._in_flight[slot] = False
        return slot


def is_credit(frame: bytes) -> bool:
    """True for a credit, False for anything else."""
    return len(frame) >= 2 and frame[0] == CREDIT and frame[1] == 0
