"""Instruction sets that an image carries kernels for, and which of them this processor has (control speed).

Images are built on one machine and run on others: ``-march=native`` would end in an illegal instruction there. Must not
know: torch.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_V2 = frozenset(("cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"))
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_V4_BF16 = _V4 | {"avx512_bf16", "avx512_vnni", "avx512vbmi"}
_TILES = frozenset(("amx_bf16", "amx_int8", "amx_tile"))


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """What kernels are compiled for."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    needs: frozenset[str]  # of the processor, as /proc/cpuinfo has them


_X86 = (  # the newest first
    InstructionSet(
        name="x86-64-v4-amx",
        flags=(
            *("-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
            *("-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"),
        ),
        needs=_V4_BF16 | _TILES,
    ),
    InstructionSet(
        name="x86-64-v4-bf16", flags=("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"), needs=_V4_BF16
    ),
    InstructionSet(name="x86-64-v4", flags=("-march=x86-64-v4",), needs=_V4),
    InstructionSet(name="x86-64-v3", flags=("-march=x86-64-v3",), needs=_V3),
    InstructionSet(name="x86-64-v2", flags=("-march=x86-64-v2",), needs=_V2),
)
_ARM = (InstructionSet(name="armv8-a", flags=("-march=armv8-a",), needs=frozenset()),)


def instruction_sets(machine: str | None = None) -> tuple[InstructionSet, ...]:
    """Those of ``machine`` (None = this one), the newest first; empty for others."""
    name = platform.machine() if machine is None else machine
    return {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(name.lower(), ())


def processor_features() -> frozenset[str]:
    """What this processor can do, as /proc/cpuinfo has it; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())


def newest_usable(candidates: tuple[InstructionSet, ...], features: frozenset[str]) -> InstructionSet | None:
    """The first of ``candidates`` that a processor with ``features`` has all of; None where there is none."""
    return next((candidate for candidate in candidates if candidate.needs <= features), None)
