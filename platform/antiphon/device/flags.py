"""Words in card memory that two processes' cards write and wait for, each in the order of what it was asked for (hot).

A card's own stream does both, by the driver's stream memory operations: a write happens behind everything asked for before, and is
seen after it; what is asked for behind a wait happens once the word has reached the value. No processor of the card spins
meanwhile, and the host waits for nothing. The stand-in's host does everything when it is asked, so that it waits itself. Values
count up and wrap around: one has been reached by any of the 2^63 that follow it. Must not know: what a word means.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Protocol

import torch

from antiphon.core.errors import InternalError, Unavailable
from antiphon.device.ready import DEADLINE_S

WORD_BYTES = 8
WRAP = 1 << 64
_LIBRARY = "libcuda.so.1"
_REACHED = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int64)(word - value) >= 0
_CAN_WAIT = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
_LOOK_S = 0.0002  # of the stand-in, between two looks at a word


class Flags(Protocol):
    """The words, by number."""

    def write(self, word: int, value: int) -> None:
        """Write behind everything that this process's stream was asked for."""
        ...

    def write_now(self, word: int, value: int) -> None:
        """Write at once, whatever the stream waits for; from any thread."""
        ...

    def wait(self, word: int, value: int, is_over: Callable[[], bool]) -> bool:
        """Let everything asked for from now on happen once the word has reached ``value``. A host that waits itself gives up
        where ``is_over`` says so: False.
        """
        ...


def has_flags(device: torch.device, library: str = _LIBRARY) -> bool:
    """Whether a card's streams can wait for words of 64 bits."""
    value = ctypes.c_int()
    try:
        code = ctypes.CDLL(library).cuDeviceGetAttribute(ctypes.byref(value), _CAN_WAIT, device.index or 0)
    except (OSError, AttributeError):
        return False
    return code == 0 and value.value == 1


class CardFlags:
    """Of one card (CUDA driver API, section 6.21)."""

    def __init__(self, words: torch.Tensor, library: str = _LIBRARY) -> None:
        """``words``: uint8 in the card's memory. Raises Unavailable: there is no driver."""
        self._device = words.device
        self._address = words.data_ptr()
        self._words = words  # the memory stays as long as this
        try:
            cuda = ctypes.CDLL(library)
        except OSError as error:
            raise Unavailable(f"no driver for cards: {error}") from error
        self._write, self._wait = cuda.cuStreamWriteValue64_v2, cuda.cuStreamWaitValue64_v2
        for operation in (self._write, self._wait):
            operation.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint)
        self._aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def write(self, word: int, value: int) -> None:
        """See ``Flags``; the driver puts a fence of the whole system before it."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _check(self._write(stream, self._address + word * WORD_BYTES, value, 0))

    def write_now(self, word: int, value: int) -> None:
        """See ``Flags``; on a card that takes nothing any more nothing waits either."""
        torch.cuda.set_device(self._device)  # this thread may not have used the card yet
        self._write(self._aside.cuda_stream, self._address + word * WORD_BYTES, value, 0)

    def wait(self, word: int, value: int, is_over: Callable[[], bool]) -> bool:
        """See ``Flags``; the host goes on at once."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _check(self._wait(stream, self._address + word * WORD_BYTES, value, _REACHED))
        return True


class PretendedFlags:
    """The stand-in, in memory of the host that two processes share; x86 keeps the order of its stores."""

    def __init__(self, words: torch.Tensor) -> None:
        """``words``: uint8."""
        self._words = words.numpy().view("uint64")

    def write(self, word: int, value: int) -> None:
        """See ``Flags``."""
        self._words[word] = value

    def write_now(self, word: int, value: int) -> None:
        """See ``Flags``."""
        self._words[word] = value

    def wait(self, word: int, value: int, is_over: Callable[[], bool]) -> bool:
        """See ``Flags``."""
        until_s = time.monotonic() + DEADLINE_S
        while (int(self._words[word]) - value) % WRAP >= WRAP // 2:
            if is_over() or time.monotonic() > until_s:
                return False
            time.sleep(_LOOK_S)
        return True


def _check(code: int) -> None:
    if code:
        raise InternalError(f"the card takes no stream memory operation: the driver gave {code}")
