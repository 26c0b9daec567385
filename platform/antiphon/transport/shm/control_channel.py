"""One end's words in a shared segment: what was sent, what came back, who sleeps (hot).

The native control channel is native/antiphon_channel.c, which describes the protocol. ``PythonControlChannel`` is its twin for
machines without a C compiler; plain Python stores are ordered only on x86, so elsewhere there is no shared memory without the
native one.
Must not know: sockets, links, what slots hold.
"""

from __future__ import annotations

import mmap
import platform
import threading
from typing import Protocol, cast

from antiphon.core.errors import Unavailable
from antiphon.transport.base import HEADER_BYTES
from antiphon.transport.native import build
from antiphon.transport.shm.segment import ENTRY_BYTES, Segment

NOTHING, CORRUPT = -1, -2
_FOR_MESSAGE, _FOR_SLOT = 1, 2


class ControlChannel(Protocol):
    """What a link does with its words. Belongs to the link's owner, as the link does."""

    def publish(self, slot: int, header: bytes | bytearray | memoryview, num_bytes: int) -> bool:
        """Send a slot with its header; True when the peer sleeps and must be woken."""
        ...

    def next(self) -> int:
        """The next message as (num_bytes << 16) | slot, or NOTHING, or CORRUPT."""
        ...

    def give(self, slot: int) -> bool:
        """Give a slot back to the peer; True when the peer sleeps for want of one."""
        ...

    def back(self) -> int:
        """A slot that came back, or NOTHING, or CORRUPT."""
        ...

    def starve(self, starved: bool, /) -> None:
        """Whether a slot that comes back counts as pending."""
        ...

    def pending(self) -> bool:
        """True when ``next``, or ``back`` while starved, has something to say."""
        ...

    def park(self) -> None:
        """Announce sleep."""
        ...

    def unpark(self) -> None:
        """Take it back."""
        ...

    def close(self) -> None:
        """Let go of the memory; afterwards there is NOTHING, for ever."""
        ...


def open_control_channel(memory: mmap.mmap, segment: Segment, *, connecting: bool, native: bool = True) -> ControlChannel:
    """The words of one end of ``segment`` in ``memory``; ``native`` False asks for the Python twin.

    Raises Unavailable where neither works.
    """
    mine, theirs = (0, 1) if connecting else (1, 0)
    out, in_ = segment.directions[mine], segment.directions[theirs]
    offsets = (out.entries, in_.entries, in_.returns, out.returns, segment.sleep[mine], segment.sleep[theirs], out.headers)
    module = build.load() if native else None
    if module is not None:
        return cast("ControlChannel", module.ControlChannel(memory, segment.num_slots, *offsets))
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("no shared memory: no C compiler, and Python's stores are not ordered on this processor")
    return PythonControlChannel(memory, segment.num_slots, *offsets)


def can_spin(channel: ControlChannel) -> bool:
    """True for a native control channel."""
    return not isinstance(channel, PythonControlChannel)


def spin(channels: tuple[ControlChannel, ...], window_s: float) -> bool:
    """Spin on native channels, without the GIL, until one is pending (True) or ``window_s`` seconds are over (False)."""
    module = build.load()
    assert module is not None, "there are native channels"
    return cast("bool", module.spin(channels, window_s))


class PythonControlChannel(ControlChannel):
    """antiphon_channel.c in Python: the same words, by 8-byte items of a memoryview (one aligned store each)."""

    def __init__(
        self,
        memory: mmap.mmap,
        num_slots: int,
        out: int,
        in_: int,
        given: int,
        back: int,
        my_sleep: int,
        peer_sleep: int,
        headers: int,
    ) -> None:
        """Byte offsets into ``memory``."""
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._out, self._in, self._given, self._back = out // 8, in_ // 8, given // 8, back // 8
        self._my_sleep, self._peer_sleep = my_sleep // 8, peer_sleep // 8
        self._headers = headers
        self._num_slots = num_slots
        self._num_out = self._num_in = self._num_given = self._num_back = 0
        self._starved = self._closed = False
        self._fence = threading.Lock()

    def publish(self, slot: int, header: bytes | bytearray | memoryview, num_bytes: int) -> bool:
        """See ``ControlChannel``."""
        at = self._headers + slot * HEADER_BYTES
        self._bytes[at : at + HEADER_BYTES] = header
        at = self._out + self._num_out % self._num_slots * (ENTRY_BYTES // 8)
        self._num_out += 1
        self._words[at + 1] = num_bytes
        self._words[at] = self._num_out << 16 | slot
        return self._asleep(_FOR_MESSAGE)

    def next(self) -> int:
        """See ``ControlChannel``."""
        if self._closed:
            return NOTHING
        at = self._in + self._num_in % self._num_slots * (ENTRY_BYTES // 8)
        slot = self._look(at, self._num_in)
        if slot < 0:
            return slot
        num_bytes = self._words[at + 1]
        if num_bytes >> 46:
            return CORRUPT
        self._num_in += 1
        return num_bytes << 16 | slot

    def give(self, slot: int) -> bool:
        """See ``ControlChannel``."""
        at = self._given + self._num_given % self._num_slots
        self._num_given += 1
        self._words[at] = self._num_given << 16 | slot
        return self._asleep(_FOR_SLOT)

    def back(self) -> int:
        """See ``ControlChannel``."""
        if self._closed:
            return NOTHING
        slot = self._look(self._back + self._num_back % self._num_slots, self._num_back)
        if slot >= 0:
            self._num_back += 1
        return slot

    def starve(self, starved: bool, /) -> None:
        """See ``ControlChannel``."""
        self._starved = starved

    def pending(self) -> bool:
        """See ``ControlChannel``."""
        if self._closed:
            return False
        at = self._in + self._num_in % self._num_slots * (ENTRY_BYTES // 8)
        if self._look(at, self._num_in) != NOTHING:
            return True
        return self._starved and self._look(self._back + self._num_back % self._num_slots, self._num_back) != NOTHING

    def park(self) -> None:
        """See ``ControlChannel``."""
        if not self._closed:
            self._words[self._my_sleep] = _FOR_MESSAGE | (_FOR_SLOT if self._starved else 0)
            self._full_fence()

    def unpark(self) -> None:
        """See ``ControlChannel``."""
        if not self._closed:
            self._words[self._my_sleep] = 0

    def close(self) -> None:
        """See ``ControlChannel``."""
        self._closed = True
        self._words.release()
        self._bytes.release()

    def _look(self, at: int, taken: int) -> int:
        value = self._words[at]
        seq = value >> 16
        if seq == taken + 1:
            slot = value & 0xFFFF
            return slot if slot < self._num_slots else CORRUPT
        a_lap_ago = taken + 1 - self._num_slots if taken >= self._num_slots else 0
        return NOTHING if seq == a_lap_ago and (seq or not value) else CORRUPT

    def _asleep(self, flag: int) -> bool:
        self._full_fence()
        return bool(self._words[self._peer_sleep] & flag)

    def _full_fence(self) -> None:
        # Taking a lock is a locked instruction, which on x86 orders this thread's earlier stores before its later loads.
        self._fence.acquire()
        self._fence.release()
