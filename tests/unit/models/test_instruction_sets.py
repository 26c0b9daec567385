"""Kernels that an image carries: built for several instruction sets, the newest that a processor has is taken at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from antiphon.models.instruction_sets import instruction_sets, newest_usable, processor_features

HASWELL = frozenset(["cx16", "popcnt", "sse4_1", "sse4_2", "ssse3", "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
SKYLAKE_SERVER = HASWELL | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
SAPPHIRE_RAPIDS = SKYLAKE_SERVER | {"amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_vnni", "avx512vbmi"}


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (SAPPHIRE_RAPIDS, "x86-64-v4-amx"),
        (SAPPHIRE_RAPIDS - {"amx_tile"}, "x86-64-v4-bf16"),
        (SKYLAKE_SERVER, "x86-64-v4"),
        (HASWELL, "x86-64-v3"),
        (HASWELL - {"fma"}, "x86-64-v2"),
        (frozenset(), None),
    ],
)
def test_the_newest_set_that_a_processor_has_all_of_is_taken(features: frozenset[str], name: str | None) -> None:
    chosen = newest_usable(instruction_sets("x86_64"), features)
    assert (None if chosen is None else chosen.name) == name


def test_other_machines_have_a_set_too() -> None:
    assert [each.name for each in instruction_sets("aarch64")] == ["armv8-a"]
    assert instruction_sets("riscv64") == ()


LOOK = "from antiphon.models.native import library\nlibrary.logger.setLevel('INFO')\nprint(library.available())"


def look(kernels: Path, tmp_path: Path) -> str:
    """Whether a process without any compiler has kernels, as in an image."""
    environment = {**os.environ, "ANTIPHON_KERNELS": str(kernels), "PATH": str(tmp_path), "ANTIPHON_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


WHOLE = "ANTIPHON_ALL_KERNELS"  # compile every kernel for the oldest set, a minute and a half, not only the smallest one


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_image_without_a_compiler_has_kernels_and_without_fitting_ones_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from antiphon.models.native import library
    from antiphon.models.native.library import build_for_image

    if not library.available():
        pytest.skip("no kernels were built on this machine")
    carried = {path.name: path for path in library.build_kernels()}
    baseline = [each for each in instruction_sets() if each.needs <= processor_features()][-1:]
    if not baseline:
        pytest.skip("no instruction set of this machine is known")
    kernels = tmp_path / "kernels"
    if os.environ.get(WHOLE) is None:
        monkeypatch.setattr(library, "_SOURCES", (Path(library.__file__).with_name("sampling.cpp"),))
    libraries = build_for_image(kernels, tuple(baseline))
    assert {path.parent.name for path in libraries} == {baseline[0].name}
    for name in carried.keys() - {path.name for path in libraries}:  # the others as they were built for this machine
        (kernels / baseline[0].name / name).symlink_to(carried[name])
    assert look(kernels, tmp_path) == "True"
    (kernels / baseline[0].name).rename(kernels / "of-another-machine")
    assert look(kernels, tmp_path) == "False"
