"""Compiles the kernels for cards that need not be there, and reads what each one takes of a card (control speed).

    launches(run)             what ``run`` would launch, recorded on tensors without memory
    compiled(launch, 90)      the same kernel for compute capability 9.0: shared memory, registers, spilled bytes

Must not know: which shapes matter (``shapes``), or how the kernels cut them (``tuning``).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel with the arguments of one call."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one kernel takes of a card."""

    name: str
    shared_bytes: int
    num_registers: int
    spilled_bytes: int


def launches(run: Callable[[], object]) -> list[Launch]:
    """The launches that ``run`` makes. It must make them on tensors of the device "meta": nothing is computed."""
    found: list[Launch] = []

    class _Recorder:
        def __init__(self, kernel: JITFunction[Any]) -> None:
            self._kernel = kernel

        def __call__(self, *values: Any, **options: int) -> None:
            arguments = dict(zip(self._kernel.arg_names, values, strict=False))
            arguments |= {name: value for name, value in options.items() if name not in _OPTIONS}
            chosen = {name: value for name, value in options.items() if name in _OPTIONS}
            found.append(Launch(kernel=self._kernel, arguments=arguments, options=chosen))

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, _grid: _Recorder(self)
    try:
        run()
    finally:
        JITFunction.__getitem__ = original
    return found


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile for a compute capability such as 80 or 90. Raises what Triton or ptxas says against it."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        value, place = launch.arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[place] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[place] = _ALIGNED
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place] = _ALIGNED
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, spilled = _usage(built.asm["cubin"])
    return Compiled(
        name=str(built.metadata.name), shared_bytes=int(built.metadata.shared), num_registers=registers, spilled_bytes=spilled
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack, which kernels without calls use for spilled registers alone."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True)
    text = done.stdout + done.stderr
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:300]}")
    return int(registers[1]), int(stack[1])
