"""Loads the compiled kernels as ``torch.ops.antiphon``; all have plain torch twins (control speed).

``python -m antiphon.models.native.library`` builds them ahead of time, as installing does: it takes about twenty seconds, so a
worker that starts only loads what was built. ANTIPHON_NATIVE=0 turns them off. Must not know: who calls the kernels.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import sysconfig
from pathlib import Path

import torch

from antiphon.core.errors import Unavailable
from antiphon.native_build import build, find_compiler, library_path

logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "experts.cpp", "halves.cpp", "sampling.cpp"))
_COMPILERS = ("c++", "g++", "clang++")


def _flags() -> list[str]:
    root = Path(torch.__file__).parent
    return [
        *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_path('include')}"),
        *(f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def build_kernels() -> tuple[Path, ...]:
    """Compile the kernels for this machine, unless that was done: a library per source.

    Raises:
        Unavailable: there is no compiler, or it refuses.
    """
    compiler = find_compiler("CXX", _COMPILERS)
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++ or clang++) on PATH")
    return tuple(build(source, compiler, _flags()) for source in _SOURCES)


@functools.cache
def available() -> bool:
    """Whether this process has the kernels, loading them at the first call."""
    if os.environ.get("ANTIPHON_NATIVE") == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    compiler = find_compiler("CXX", _COMPILERS)
    if compiler is None:
        return False
    libraries = [library_path(source, compiler, _flags()) for source in _SOURCES]
    if not all(library.exists() for library in libraries):
        logger.info("kernels are not built, the torch path serves: python -m antiphon.models.native.library builds them")
        return False
    try:
        for library in libraries:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("kernels can't be loaded, the torch path serves: %s", error)
        return False
    return True


@functools.cache
def tiles_available() -> bool:
    """Whether this process has the kernels for matrix units and its processor the units (AMX with bfloat16).

    ANTIPHON_TILES=0 turns them off, for comparisons.
    """
    return os.environ.get("ANTIPHON_TILES") != "0" and available() and bool(torch.ops.antiphon.tiles_ready())


if __name__ == "__main__":
    try:
        print(*build_kernels(), sep="\n")  # noqa: T201  # a command's answer
    except Unavailable as error:
        print(f"kernels are not built: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
