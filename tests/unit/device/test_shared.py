"""What the driver is asked for memory that two processes share, against a driver of our own with the documented interface."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.core.errors import Unavailable
from antiphon.device.shared import HANDLE_BYTES, CardMemory, PretendedMemory, shared_memory

DRIVER = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { unsigned char reserved[64]; } CUipcMemHandle;
static uint64_t freed, closed;
int cuMemAlloc_v2(uint64_t *address, size_t bytes) { *address = 0x7f0000000000ull + bytes; return bytes > 1 << 20 ? 2 : 0; }
int cuMemFree_v2(uint64_t address) { freed = address; return 0; }
int cuIpcGetMemHandle(CUipcMemHandle *handle, uint64_t address)
{ memset(handle, 0xfe, 64); memcpy(handle->reserved + 8, &address, 8); return 0; }
int cuIpcOpenMemHandle_v2(uint64_t *address, CUipcMemHandle handle, unsigned flags)
{ memcpy(address, handle.reserved + 8, 8); return handle.reserved[63] != 0xfe || flags != 1; }
int cuIpcCloseMemHandle(uint64_t address) { closed = address; return 0; }
uint64_t last_freed(void) { return freed; }
uint64_t last_closed(void) { return closed; }
"""


class Held:
    """What torch makes of memory by its address: it keeps the owner."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.is_zero = False

    def zero_(self) -> None:
        self.is_zero = True


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CardMemory:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "driver.c", tmp_path / "libdriver.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch, "as_tensor", lambda owner, device: Held(owner))
    made = CardMemory(torch.device("cuda", 0), str(library))
    for name in ("last_freed", "last_closed"):
        getattr(made._cuda, name).restype = ctypes.c_uint64
    return made


def address_of(region: Any) -> int:
    interface = region.data.owner.__cuda_array_interface__
    assert interface["typestr"] == "|u1"
    address: int = interface["data"][0]
    return address


def test_a_region_is_opened_by_its_handle_and_freed_with_its_last_tensor(memory: CardMemory) -> None:
    made, handle = memory.make(4096)
    assert len(handle) == HANDLE_BYTES
    assert made.data.is_zero  # type: ignore[attr-defined]
    opened = memory.open(handle, 4096)
    assert address_of(opened) == address_of(made) == 0x7F0000000000 + 4096
    data = made.data
    del made
    gc.collect()
    assert memory._cuda.last_freed() == 0
    del data, opened
    gc.collect()
    assert memory._cuda.last_freed() == memory._cuda.last_closed() == 0x7F0000000000 + 4096


def test_what_the_driver_refuses_is_unavailable(memory: CardMemory) -> None:
    with pytest.raises(Unavailable, match="cuMemAlloc_v2 gave 2"):
        memory.make(1 << 30)
    with pytest.raises(Unavailable, match="cuIpcOpenMemHandle_v2 gave 1"):
        memory.open(bytes(HANDLE_BYTES), 4096)


def test_a_handle_of_nothing_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="can't be opened"):
        PretendedMemory().open(bytes(HANDLE_BYTES), 4096)
    with pytest.raises(Unavailable, match="no shared memory of kind 'tpu'"):
        shared_memory("tpu")
