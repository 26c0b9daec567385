"""A card's memory that two processes of one machine share: one makes a region, the other opens it by its handle (control speed).

    maker:   make(num_bytes) ──► region, handle ── 64 bytes, by a socket ──►  opener: open(handle, num_bytes) ──► region

The region is the maker's: it goes when the maker's last tensor over it does, so whoever must outlive the other makes it. No stream
orders what one process does with it against what the other does: ``settled`` gives what to wait for before the other is told of
anything. The stand-in is memory of the host, for processes that take their CPU for a card. Must not know: what lies in a region.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import weakref
from typing import Any, Protocol

import torch

from antiphon.core.errors import Unavailable
from antiphon.device.device import PRETENDS
from antiphon.device.flags import CardFlags, Flags, PretendedFlags, has_flags
from antiphon.device.ready import THERE, CardReady, Settled

HANDLE_BYTES = 64
# Kinds of memory, as both ends of a link call them; those with flags have words that cards wait for.
CARD, CARD_WITH_FLAGS = "cuda", "cuda-flags"
PRETENDED, PRETENDED_WITH_FLAGS = "pretended", "pretended-flags"
WITH_FLAGS = (CARD_WITH_FLAGS, PRETENDED_WITH_FLAGS)
_LIBRARY = "libcuda.so.1"
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class SharedRegion(Protocol):
    """One region as one process sees it."""

    @property
    def data(self) -> torch.Tensor:
        """uint8 [num_bytes]."""
        ...

    def settled(self) -> Settled:
        """When everything is done that this process asked for up to now: writes, and reads too."""
        ...

    def handed_over(self) -> None:
        """The other process has opened it, or will not; idempotent."""
        ...

    def flags(self, at: int) -> Flags:
        """Words from byte ``at`` to the region's end."""
        ...


class SharedMemory(Protocol):
    """Where regions are made and opened."""

    def make(self, num_bytes: int) -> tuple[SharedRegion, bytes]:
        """A region of zeros and its handle. Raises Unavailable."""
        ...

    def open(self, handle: bytes, num_bytes: int) -> SharedRegion:
        """A region that another process made. Raises Unavailable."""
        ...


def kind_of(device: torch.device) -> str:
    """What memory of ``device`` is called on links; "" where it is the host's."""
    if device.type == "cuda":
        return CARD_WITH_FLAGS if has_flags(device) else CARD
    return PRETENDED_WITH_FLAGS if PRETENDS else ""


def shared_memory(kind: str) -> SharedMemory:
    """Memory of that kind. Raises Unavailable: there is none in this process."""
    if kind in (PRETENDED, PRETENDED_WITH_FLAGS):
        return PretendedMemory()
    if kind in (CARD, CARD_WITH_FLAGS) and torch.cuda.is_available():
        return CardMemory(torch.device("cuda", torch.cuda.current_device()))
    raise Unavailable(f"no shared memory of kind {kind!r}")


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Allocation:
    """Memory by its address, as torch takes it; freed with the last tensor over it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


class CardMemory:
    """Memory of one card: plain allocations, exported by handles of the driver (CUDA driver API, section 6.13)."""

    def __init__(self, device: torch.device, library: str = _LIBRARY) -> None:
        """Raises Unavailable: there is no driver."""
        self._device = device
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise Unavailable(f"no driver for cards: {error}") from error
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint)
        self._cuda.cuMemAlloc_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t)
        self._cuda.cuIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), ctypes.c_uint64)
        self._cuda.cuMemFree_v2.argtypes = (ctypes.c_uint64,)
        self._cuda.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)

    def make(self, num_bytes: int) -> tuple[SharedRegion, bytes]:
        """See ``SharedMemory``."""
        address, handle = ctypes.c_uint64(), _Handle()
        self._call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        region = self._region(address.value, num_bytes, self._cuda.cuMemFree_v2)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address.value)
        region.data.zero_()
        torch.cuda.synchronize(self._device)
        return region, bytes(handle.reserved)

    def open(self, handle: bytes, num_bytes: int) -> SharedRegion:
        """See ``SharedMemory``."""
        address = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
        return self._region(address.value, num_bytes, self._cuda.cuIpcCloseMemHandle)

    def _region(self, address: int, num_bytes: int, free: Any) -> SharedRegion:
        owner = _Allocation(address, num_bytes)
        weakref.finalize(owner, free, address).atexit = False  # the driver's context may be gone by then, and all with it
        return _CardRegion(torch.as_tensor(owner, device=self._device))

    def _call(self, name: str, *arguments: object) -> None:
        torch.cuda.set_device(self._device)  # a link's thread may be one that has not used the card yet
        if code := getattr(self._cuda, name)(*arguments):
            raise Unavailable(f"the driver shares no memory: {name} gave {code}")


class _CardRegion:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def settled(self) -> Settled:
        return CardReady(self.data.device)

    def handed_over(self) -> None:
        return

    def flags(self, at: int) -> Flags:
        return CardFlags(self.data[at:])


class PretendedMemory:
    """The stand-in: anonymous files of the host, which the other process opens through the maker's descriptors."""

    _HANDLE = struct.Struct("<qq")  # process, descriptor

    def make(self, num_bytes: int) -> tuple[SharedRegion, bytes]:
        """See ``SharedMemory``."""
        fd = os.memfd_create("antiphon-pretended-card", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return PretendedRegion(fd, num_bytes), self._HANDLE.pack(os.getpid(), fd).ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes, num_bytes: int) -> SharedRegion:
        """See ``SharedMemory``."""
        process, fd = self._HANDLE.unpack_from(handle)
        try:
            region = PretendedRegion(os.open(f"/proc/{process}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), num_bytes)
        except (OSError, ValueError) as error:
            raise Unavailable(f"the pretended card's memory can't be opened: {error}") from error
        region.handed_over()
        return region


class PretendedRegion:
    """See ``SharedRegion``; the host's own loads and stores are over when they return."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        try:
            self.data = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        except (OSError, ValueError):
            os.close(fd)
            raise

    def settled(self) -> Settled:
        """See ``SharedRegion``."""
        return THERE

    def flags(self, at: int) -> Flags:
        """See ``SharedRegion``."""
        return PretendedFlags(self.data[at:])

    def handed_over(self) -> None:
        """See ``SharedRegion``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
