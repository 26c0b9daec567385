"""A link over memory both ends map: slots in place, spin, then sleep (hot). transport.py opens it.

Headers lie with their slots, so that a message stays whole until its release, in whatever order slots come and go. Slots of two
cards lie in a region of a card's memory, in the order that ``card_slots`` keeps; what is told of them is in host memory even so.
Must not know: how the memory came to be shared.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Sequence

import torch

from antiphon.core.errors import CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import THERE, Ready
from antiphon.device.shared import WITH_FLAGS, SharedRegion
from antiphon.transport.base import HEADER_BYTES, Hello, Link, Message, Slot, await_bytes
from antiphon.transport.liveness import PeerLiveness
from antiphon.transport.shm.card_slots import CardSlots, FlagOrdered, HostOrdered
from antiphon.transport.shm.control_channel import CORRUPT, NOTHING, ControlChannel, can_spin, open_control_channel, spin
from antiphon.transport.shm.segment import Direction, Segment
from antiphon.transport.slots import MessageViews, byte_rows, slots_of
from antiphon.transport.waiting import bounded, sleep_on, wait_on
from antiphon.transport.wakeup import Wakeup

_PYTHON_SPIN_S = 300e-6


class RingLink(Link):
    """One end; see the seam for the rules."""

    def __init__(
        self,
        mine: Hello,
        theirs: Hello,
        memory: mmap.mmap,
        liveness: PeerLiveness,
        wakeups: tuple[Wakeup, Wakeup],
        *,
        connecting: bool,
        spin_s: float,
        native: bool = True,
        region: SharedRegion | None = None,
    ) -> None:
        """The hellos fit; ``wakeups`` are the one that wakes this end and the one that wakes the peer. ``region``: where slots lie,
        None = in ``memory``.
        """
        segment = Segment.of(mine.layout, connecting=connecting, apart=region is not None)
        self.card: CardSlots | None = None
        if region is not None and mine.layout.memory in WITH_FLAGS:
            flags = region.flags(segment.flags_at)
            self.card = FlagOrdered(region, flags, segment.num_slots, connecting=connecting, is_gone=self._is_gone)
        elif region is not None:
            self.card = HostOrdered(region)
        self._theirs = theirs
        self._num_slots = segment.num_slots
        self._recv_slot_bytes = mine.layout.recv_slot_bytes
        self._channel = open_control_channel(memory, segment, connecting=connecting, native=native)
        self._native = can_spin(self._channel)
        out, in_ = segment.directions if connecting else segment.directions[::-1]
        rows = [_slots(memory if region is None else region.data, segment.num_slots, direction) for direction in (out, in_)]
        headers = memoryview(memory)[in_.headers : in_.headers + segment.num_slots * HEADER_BYTES]
        self._slots = slots_of(rows[0])
        self._views: MessageViews | None = MessageViews(rows[1], headers)
        self._free = list(range(segment.num_slots - 1, -1, -1))
        self._in_flight = [False] * segment.num_slots
        self._held = [False] * segment.num_slots
        self._starved = False
        self._lost: str | None = None
        self._liveness = liveness
        self._my_wakeup, self._peer_wakeup = wakeups
        # A channel in Python can only spin with the GIL, which other threads of the process need.
        self._spin_s = bounded(spin_s if self._native else min(spin_s, _PYTHON_SPIN_S))
        self._moved_s = time.monotonic()  # when a message last came or went: spinning pays for a window after that

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._theirs.worker_id

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._theirs.epoch

    @property
    def num_free_slots(self) -> int:
        """Slots not in flight."""
        with contextlib.suppress(CorruptMessage):  # the link is closed by it, and every later call tells
            self._collect()
        return len(self._free)

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost, CorruptMessage."""
        if self._lost is not None or self._liveness.ended():
            self._raise_lost()
        if not self._free:
            self._collect()
        if self._free:
            if self._starved:
                self._starve(False)
            slot = self._slots[self._free.pop()]
            if self.card is not None:
                self.card.before_writing(slot.index)
            return slot
        if not self._starved:
            self._starve(True)
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """Publish the slot. Raises PeerLost."""
        await_bytes(ready, self.peer)
        if self._lost is not None:
            self._raise_lost()
        index = slot.index
        if self.card is not None:  # no stream orders the peer's reading behind our writing, whatever the caller thinks is there
            self.card.written(index)
        self._in_flight[index] = True
        self._moved_s = time.monotonic()
        if self._channel.publish(index, header, num_bytes):
            self._peer_wakeup.ring()

    def poll(self) -> Message | None:
        """The next message, or None. Raises PeerLost, CorruptMessage."""
        if self._lost is not None:
            self._raise_lost()
        found = self._channel.next()
        if found == NOTHING:
            # Dead first, then look again: what was published before the death is handed out.
            if self._liveness.ended() and (found := self._channel.next()) == NOTHING:
                self._raise_lost()
            if found == NOTHING:
                return None
        slot, num_bytes = found & 0xFFFF, found >> 16
        if found == CORRUPT or num_bytes > self._recv_slot_bytes or self._held[slot]:
            self._corrupt(f"the ring's next entry is damaged ({found:#x})")
        self._held[slot] = True
        self._moved_s = time.monotonic()
        if self.card is not None:
            self.card.before_reading(slot)
        assert self._views is not None  # gone only after close, which _lost tells
        return self._views.view(slot, num_bytes)

    def release(self, message: Message) -> None:
        """Give the slot back."""
        slot = message.slot
        self._held[slot] = False
        if self.card is not None:
            self.card.read(slot)  # nor does one order its next writing behind our reading
        if self._lost is None and self._channel.give(slot):
            self._peer_wakeup.ring()

    def wait(self, timeout_s: float) -> bool:
        """Spin, then sleep. Raises PeerLost."""
        if self._lost is not None:
            self._raise_lost()
        if self._native:
            now_s = time.monotonic()
            window_s = self._moved_s + self._spin_s - now_s
            found = spin((self._channel,), min(window_s, timeout_s))  # looks at least once
            if not found and window_s < timeout_s:
                found = sleep_on((self,), now_s + timeout_s)
        else:
            found = wait_on((self,), timeout_s)
        if self._liveness.lost is not None and not self._channel.pending():
            self._raise_lost()
        return found

    def close(self) -> None:
        """Close; the memory goes when the last tensor over it does. Idempotent."""
        if self._lost is None:
            self._lost = "closed here"
        self._liveness.close()
        self._my_wakeup.close()
        self._peer_wakeup.close()
        self._channel.close()
        if self.card is not None:
            self.card.poison()
        self._slots, self._views, self.card = [], None, None

    @property
    def spin_s(self) -> float:
        """What is left of the window since a message last came or went."""
        return max(0.0, self._moved_s + self._spin_s - time.monotonic())

    @property
    def spin_channel(self) -> ControlChannel | None:
        """The native control channel."""
        return self._channel if self._native else None

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there."""
        return self._lost is not None or self._liveness.lost is not None or bool(self._channel.pending())

    def park(self) -> Sequence[int]:
        """Ask to be rung; the peer's death wakes too."""
        if self._lost is not None:
            return ()
        self._channel.park()
        return (self._my_wakeup.fd, *self._liveness.fds)

    def unpark(self, *, woken: bool) -> None:
        """Ask no longer."""
        if self._lost is not None:
            return
        self._channel.unpark()
        if woken:
            self._my_wakeup.clear()
            self._liveness.look()

    def _is_gone(self) -> bool:
        return self._lost is not None or self._liveness.ended()

    def _collect(self) -> None:
        while (slot := self._channel.back()) != NOTHING:
            if slot == CORRUPT or not self._in_flight[slot]:
                self._corrupt("a slot came back that is not in flight")
            self._in_flight[slot] = False
            self._free.append(slot)

    def _starve(self, starved: bool) -> None:
        self._starved = starved
        self._channel.starve(starved)

    def _corrupt(self, why: str) -> None:
        self._lost = f"corrupt message: {why}"
        self.close()
        raise CorruptMessage(self.peer, why)

    def _raise_lost(self) -> None:
        if self._lost is None:
            self._lost = self._liveness.lost or "it is gone"
        raise PeerLost(self.peer, self._lost)


def _slots(memory: mmap.mmap | torch.Tensor, num_slots: int, direction: Direction) -> torch.Tensor:
    """uint8 [num_slots, slot_bytes], in host memory or in a region."""
    if isinstance(memory, mmap.mmap):
        return byte_rows(memory, num_slots, direction.slots, direction.stride_bytes)[:, : direction.slot_bytes]
    end = direction.slots + num_slots * direction.stride_bytes
    return memory[direction.slots : end].view(num_slots, direction.stride_bytes)[:, : direction.slot_bytes]
