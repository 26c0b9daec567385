"""What the driver is asked for words that cards wait for, against a driver of our own as documented; and the stand-in."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from antiphon.core.errors import InternalError, Unavailable
from antiphon.device.flags import CardFlags, PretendedFlags, has_flags

DRIVER = r"""
#include <stdint.h>
static uint64_t seen[4];
static int note(void *stream, uint64_t address, uint64_t value, unsigned flags)
{ seen[0] = (uint64_t)stream; seen[1] = address; seen[2] = value; seen[3] = flags; return value == 13; }
int cuStreamWriteValue64_v2(void *s, uint64_t a, uint64_t v, unsigned f) { return note(s, a, v, f); }
int cuStreamWaitValue64_v2(void *s, uint64_t a, uint64_t v, unsigned f) { return note(s, a, v, f); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 122 && device == 0; return 0; }
uint64_t last(int which) { return seen[which]; }
"""
MAIN, ASIDE = 0x1000, 0x2000  # streams


@pytest.fixture
def library(tmp_path: Path) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, made = tmp_path / "driver.c", tmp_path / "libdriver.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True, timeout=60)
    return str(made)


def test_words_are_written_and_waited_for_in_the_current_stream_and_poisoned_aside(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: SimpleNamespace(cuda_stream=ASIDE))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=MAIN))
    words = torch.zeros(64, dtype=torch.uint8)
    flags = CardFlags(words, library)
    driver = ctypes.CDLL(library)
    driver.last.restype = ctypes.c_uint64

    def last() -> tuple[int, ...]:
        return tuple(driver.last(which) for which in range(4))

    flags.write(2, 2**64 - 1)
    assert last() == (MAIN, words.data_ptr() + 16, 2**64 - 1, 0)
    assert flags.wait(3, 7, lambda: True)  # the host waits for nothing
    assert last() == (MAIN, words.data_ptr() + 24, 7, 0)
    flags.write_now(1, 1 << 62)
    assert last() == (ASIDE, words.data_ptr() + 8, 1 << 62, 0)
    with pytest.raises(InternalError, match="gave 1"):
        flags.write(0, 13)


def test_a_card_is_asked_whether_it_can_wait(library: str) -> None:
    assert has_flags(torch.device("cuda", 0), library)
    assert not has_flags(torch.device("cuda", 1), library)
    assert not has_flags(torch.device("cuda", 0), "libnothing.so")
    with pytest.raises(Unavailable, match="no driver"):
        CardFlags(torch.zeros(8, dtype=torch.uint8), "libnothing.so")


def test_the_stand_in_waits_itself_until_the_value_is_reached_or_the_wait_is_over() -> None:
    flags = PretendedFlags(torch.zeros(16, dtype=torch.uint8))
    flags.write(1, 5)
    assert flags.wait(1, 5, lambda: False)
    assert flags.wait(1, 2**64 - 2, lambda: False)  # behind, by a comparison that wraps around
    assert not flags.wait(1, 6, lambda: True)
