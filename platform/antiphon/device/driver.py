"""The one door to the graphics driver, without torch: which cards this machine shows to this process (control speed).

Asked before anything is started, where importing torch would take seconds. Must not know: what cards are wanted for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CARDS_VARIABLE = "CUDA_VISIBLE_DEVICES"  # the driver's own; names the cards that a process may see

_LIBRARY = "libcuda.so.1"
_VERSION_FILE = Path("/sys/module/nvidia/version")
_NAME_BYTES = 256
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card as the driver describes it; ``visible`` is what ``CARDS_VARIABLE`` calls it."""

    visible: str
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """What was found; ``why_none`` says in words why there are none. ``driver``: its version, "" where it does not say."""

    cards: tuple[Card, ...] = ()
    driver: str = ""
    why_none: str = ""


class _DriverError(Exception):
    pass


def look_for_cards(library: str = _LIBRARY, environment: Mapping[str, str] = os.environ) -> Cards:
    """The cards that the driver shows; never raises, because having none is an answer."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Cards(why_none=f"this machine has no NVIDIA driver ({library} is not there)")
    try:
        return _ask(cuda, environment)
    except (_DriverError, AttributeError) as error:
        return Cards(why_none=f"the NVIDIA driver does not answer: {error}")


def _ask(cuda: ctypes.CDLL, environment: Mapping[str, str]) -> Cards:
    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            raise _DriverError(f"{name} gave {code}")

    call("cuInit", 0)
    version, count = ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    call("cuDeviceGetCount", ctypes.byref(count))
    driver = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if _VERSION_FILE.exists():
        driver = f"{_VERSION_FILE.read_text().strip()}, {driver}"
    shown = [part.strip() for part in environment.get(CARDS_VARIABLE, "").split(",") if part.strip()]
    cards = []
    for ordinal in range(count.value):
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        major, minor = ctypes.c_int(), ctypes.c_int()
        call("cuDeviceGet", ctypes.byref(device), ordinal)
        call("cuDeviceGetName", name, _NAME_BYTES, device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_MINOR, device)
        cards.append(
            Card(
                visible=shown[ordinal] if ordinal < len(shown) else str(ordinal),
                name=name.value.decode(errors="replace"),
                memory_bytes=memory.value,
                capability=(major.value, minor.value),
            )
        )
    hidden = f" ({CARDS_VARIABLE} is {environment[CARDS_VARIABLE]!r})" if CARDS_VARIABLE in environment else ""
    return Cards(cards=tuple(cards), driver=driver, why_none="" if cards else f"the NVIDIA driver shows no card{hidden}")
