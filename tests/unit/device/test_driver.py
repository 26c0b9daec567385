"""What this machine's driver is asked, against a driver of our own that answers as NVIDIA's interface is documented."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from antiphon.cli.doctor import check_cards, line
from antiphon.device.driver import Card, Cards, look_for_cards

DRIVER = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA Test", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
"""


def driver(tmp_path: Path, count: int, init: int = 0) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "driver.c", tmp_path / f"libdriver-{count}-{init}.so"
    source.write_text(DRIVER)
    flags = [f"-DCOUNT={count}", f"-DINIT={init}", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True, timeout=60)
    return str(library)


def test_cards_are_listed_with_memory_and_driver(tmp_path: Path) -> None:
    found = look_for_cards(driver(tmp_path, 2), {})
    assert [card.visible for card in found.cards] == ["0", "1"]
    assert found.cards[0] == Card(visible="0", name="NVIDIA Test", memory_bytes=80 << 30, capability=(9, 0))
    assert "CUDA 12.8" in found.driver
    told = [line(finding) for finding in check_cards(found)]
    assert told[0].startswith("ok   card 0: NVIDIA Test, 80 GiB, compute 9.0, driver ")


def test_cards_keep_the_names_that_the_environment_gives_them(tmp_path: Path) -> None:
    found = look_for_cards(driver(tmp_path, 2), {"CUDA_VISIBLE_DEVICES": "3,GPU-abc"})
    assert [card.visible for card in found.cards] == ["3", "GPU-abc"]


def test_a_driver_that_fails_is_told_apart_from_none(tmp_path: Path) -> None:
    assert look_for_cards(driver(tmp_path, 1, init=100), {}).why_none == "the NVIDIA driver does not answer: cuInit gave 100"
    hidden = look_for_cards(driver(tmp_path, 0), {"CUDA_VISIBLE_DEVICES": ""})
    assert hidden.why_none == "the NVIDIA driver shows no card (CUDA_VISIBLE_DEVICES is '')"


def test_a_machine_without_a_driver_is_no_fault() -> None:
    found = look_for_cards("libthere-is-none.so.1", {})
    assert found.why_none == "this machine has no NVIDIA driver (libthere-is-none.so.1 is not there)"
    (finding,) = check_cards(found)
    assert finding.ok is None


def test_a_torch_that_can_not_use_the_card_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "2.13.0+cpu")
    card = Card(visible="0", name="NVIDIA Test", memory_bytes=80 << 30, capability=(9, 0))
    assert [finding.ok for finding in check_cards(Cards(cards=(card,), driver="1"))] == [True, False]
