"""One end's words in a shared segment: what was sent, what came back, who sleeps (hot).

The native lane calls native/lane.c, which describes the protocol. ``_PythonLane`` is its twin for machines without a C compiler;
plain Python stores are ordered only on x86, so elsewhere there is no shared memory without the native one.
Must not know: sockets, links, what slots hold.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from antiphon.core.errors import Unavailable
from antiphon.transport.native import build
from antiphon.transport.segment import ENTRY_BYTES, Segment
from antiphon.transport.slots import byte_rows

NOTHING, CORRUPT = -1, -2
_FOR_MESSAGE, _FOR_SLOT = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """What a link does with its words: plain callables, so that a native call costs one call."""

    address: int  # of the native lane to spin on, 0 for none
    publish: Callable[[int, int], int]  # (slot, num_bytes): send; true when the peer sleeps and must be woken
    next: Callable[[], int]  # the next message as (num_bytes << 16) | slot, or NOTHING, or CORRUPT
    give: Callable[[int], int]  # (slot): give it back; true when the peer sleeps for want of one
    back: Callable[[], int]  # a slot that came back, or NOTHING, or CORRUPT
    starve: Callable[[bool], None]  # whether a slot that comes back counts as pending
    pending: Callable[[], int]  # true when ``next``, or ``back`` while starved, has something to say
    park: Callable[[], None]  # announce sleep
    unpark: Callable[[], None]  # take it back
    owner: object  # keeps the words' memory


CLOSED_LANE = Lane(
    address=0,
    publish=lambda _slot, _num_bytes: 0,
    next=lambda: NOTHING,
    give=lambda _slot: 0,
    back=lambda: NOTHING,
    starve=lambda _starved: None,
    pending=lambda: 0,
    park=lambda: None,
    unpark=lambda: None,
    owner=None,
)  # stands where a lane was, so that its memory can go


class _LaneStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("out", "in_", "given", "back", "my_sleep", "peer_sleep")),
        *((name, ctypes.c_uint64) for name in ("num_slots", "num_out", "num_in", "num_given", "num_back", "starved")),
    ]


class _Library:
    """lane.c's functions with their types declared; each call holds the GIL, except ``spin``."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        pointer, u32, u64, i64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64
        self.publish = _declare(library.lane_publish, ctypes.c_int, pointer, u32, u64)
        self.next = _declare(library.lane_next, i64, pointer)
        self.give = _declare(library.lane_give, ctypes.c_int, pointer, u32)
        self.back = _declare(library.lane_back, i64, pointer)
        self.pending = _declare(library.lane_pending, ctypes.c_int, pointer)
        self.park = _declare(library.lane_park, None, pointer)
        self.unpark = _declare(library.lane_unpark, None, pointer)
        self.spin = _declare(ctypes.CDLL(library._name).lanes_spin, ctypes.c_int, pointer, u32, u64)


def _declare(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:
    function.restype, function.argtypes = result, arguments
    return cast("Callable[..., Any]", function)


@functools.cache
def _library() -> _Library | None:
    library = build.load()
    return None if library is None else _Library(library)


def open_lane(memory: mmap.mmap, segment: Segment, *, connecting: bool, native: bool = True) -> Lane:
    """The words of one end of ``segment`` in ``memory``; ``native`` False asks for the Python twin.

    Raises Unavailable where neither works.
    """
    library = _library() if native else None
    if library is not None:
        return _native_lane(library, memory, segment, connecting=connecting)
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("no shared memory: no C compiler, and Python's stores are not ordered on this processor")
    return _python_lane(memory, segment, connecting=connecting)


def spin(addresses: tuple[int, ...], window_s: float) -> bool:
    """Spin on native lanes, without the GIL, until one is pending (True) or ``window_s`` seconds are over (False)."""
    library = _library()
    assert library is not None, "only native lanes have an address"
    return bool(library.spin(_pointers(addresses), len(addresses), int(window_s * 1e9)))


@functools.lru_cache(maxsize=64)
def _pointers(addresses: tuple[int, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _native_lane(library: _Library, memory: mmap.mmap, segment: Segment, *, connecting: bool) -> Lane:
    page = byte_rows(memory, 1)  # holds the mapping
    base = page.data_ptr()
    mine, theirs = (0, 1) if connecting else (1, 0)
    out, in_ = segment.directions[mine], segment.directions[theirs]
    struct = _LaneStruct(
        out=base + out.entries,
        in_=base + in_.entries,
        given=base + in_.returns,
        back=base + out.returns,
        my_sleep=base + segment.sleep[mine],
        peer_sleep=base + segment.sleep[theirs],
        num_slots=segment.num_slots,
    )
    address = ctypes.addressof(struct)

    def starve(starved: bool) -> None:
        struct.starved = starved

    return Lane(
        address=address,
        publish=functools.partial(library.publish, address),
        next=functools.partial(library.next, address),
        give=functools.partial(library.give, address),
        back=functools.partial(library.back, address),
        starve=starve,
        pending=functools.partial(library.pending, address),
        park=functools.partial(library.park, address),
        unpark=functools.partial(library.unpark, address),
        owner=(struct, page),
    )


class _PythonLane:
    """lane.c in Python: the same words, by 8-byte items of a memoryview (one aligned store each)."""

    def __init__(self, memory: mmap.mmap, segment: Segment, *, connecting: bool) -> None:
        mine, theirs = (0, 1) if connecting else (1, 0)
        out, in_ = segment.directions[mine], segment.directions[theirs]
        self.words = memoryview(memory).cast("Q")
        self._out, self._in = out.entries // 8, in_.entries // 8
        self._given, self._back = in_.returns // 8, out.returns // 8
        self._my_sleep, self._peer_sleep = segment.sleep[mine] // 8, segment.sleep[theirs] // 8
        self._num_slots = segment.num_slots
        self._num_out = self._num_in = self._num_given = self._num_back = 0
        self._starved = False
        self._fence = threading.Lock()

    def publish(self, slot: int, num_bytes: int) -> int:
        at = self._out + self._num_out % self._num_slots * (ENTRY_BYTES // 8)
        self._num_out += 1
        self.words[at + 1] = num_bytes
        self.words[at] = self._num_out << 16 | slot
        return self._asleep(_FOR_MESSAGE)

    def next(self) -> int:
        at = self._in + self._num_in % self._num_slots * (ENTRY_BYTES // 8)
        slot = self._look(at, self._num_in)
        if slot < 0:
            return slot
        num_bytes = self.words[at + 1]
        if num_bytes >> 46:
            return CORRUPT
        self._num_in += 1
        return num_bytes << 16 | slot

    def give(self, slot: int) -> int:
        at = self._given + self._num_given % self._num_slots
        self._num_given += 1
        self.words[at] = self._num_given << 16 | slot
        return self._asleep(_FOR_SLOT)

    def back(self) -> int:
        slot = self._look(self._back + self._num_back % self._num_slots, self._num_back)
        if slot >= 0:
            self._num_back += 1
        return slot

    def starve(self, starved: bool) -> None:
        self._starved = starved

    def pending(self) -> int:
        at = self._in + self._num_in % self._num_slots * (ENTRY_BYTES // 8)
        if self._look(at, self._num_in) != NOTHING:
            return True
        return self._starved and self._look(self._back + self._num_back % self._num_slots, self._num_back) != NOTHING

    def park(self) -> None:
        self.words[self._my_sleep] = _FOR_MESSAGE | (_FOR_SLOT if self._starved else 0)
        self._full_fence()

    def unpark(self) -> None:
        self.words[self._my_sleep] = 0

    def _look(self, at: int, taken: int) -> int:
        value = self.words[at]
        seq = value >> 16
        if seq == taken + 1:
            slot = value & 0xFFFF
            return slot if slot < self._num_slots else CORRUPT
        a_lap_ago = taken + 1 - self._num_slots if taken >= self._num_slots else 0
        return NOTHING if seq == a_lap_ago and (seq or not value) else CORRUPT

    def _asleep(self, flag: int) -> int:
        self._full_fence()
        return self.words[self._peer_sleep] & flag

    def _full_fence(self) -> None:
        # Taking a lock is a locked instruction, which on x86 orders this thread's earlier stores before its later loads.
        self._fence.acquire()
        self._fence.release()


def _python_lane(memory: mmap.mmap, segment: Segment, *, connecting: bool) -> Lane:
    lane = _PythonLane(memory, segment, connecting=connecting)
    return Lane(
        address=0,
        publish=lane.publish,
        next=lane.next,
        give=lane.give,
        back=lane.back,
        starve=lane.starve,
        pending=lane.pending,
        park=lane.park,
        unpark=lane.unpark,
        owner=lane,
    )
