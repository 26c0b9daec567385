"""Loads the compiled kernels as ``torch.ops.antiphon``; all have plain torch twins (control speed).

``python -m antiphon.models.native.library`` builds them ahead of time, as installing does: it takes about twenty seconds, so a
worker that starts only loads what was built. With ``--into DIRECTORY`` it builds them for every instruction set of this kind of
machine, as an image wants it; ANTIPHON_KERNELS names such a directory, and a start takes the newest that its processor has.
ANTIPHON_NATIVE=0 turns them off. Must not know: who calls the kernels.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from antiphon.core.errors import Unavailable
from antiphon.device.device import PRETENDS
from antiphon.models.instruction_sets import InstructionSet, instruction_sets, newest_usable, processor_features
from antiphon.models.kernel_marker import COMPILERS, built_marker
from antiphon.native_build import build, compile_into, find_compiler, library_path

logger = logging.getLogger(__name__)

_NAMES = ("kernels", "attention", "packed/linear", "packed/experts", "matrix_units/halves", "sampling", "delta")
_SOURCES = tuple(Path(__file__).parent / f"{name}.cpp" for name in _NAMES)
_MOST_COMPILERS = 4  # at once: each takes up to a gigabyte
_IMAGE_TIMEOUT_S = 3600.0  # images for other machines are built under emulation, some thirty times as slow


def _flags(machine: tuple[str, ...] = ("-march=native",)) -> list[str]:
    root = Path(torch.__file__).parent
    return [
        *("-std=c++20", "-O3", *machine, "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_path('include')}"),
        *(f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def build_kernels(built: Callable[[Path], None] = lambda _library: None) -> tuple[Path, ...]:
    """Compile the kernels for this machine, unless that was done: a library per source. ``built`` gets each when it is there.

    Raises:
        Unavailable: there is no compiler, or it refuses.
    """
    compiler = find_compiler("CXX", COMPILERS)
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++ or clang++) on PATH")
    with _compilers() as at_once:
        running = [at_once.submit(build, source, compiler, _flags()) for source in _SOURCES]
        for one in as_completed(running):
            built(one.result())
    built_marker().touch()
    return tuple(one.result() for one in running)


def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(len(_SOURCES), os.cpu_count() or 1, _MOST_COMPILERS), "compiler")


def build_for_image(directory: Path, wanted: tuple[InstructionSet, ...] | None = None) -> tuple[Path, ...]:
    """Compile the kernels for ``wanted`` (None = all of this kind of machine) into ``directory``, a folder for each.

    Raises:
        Unavailable: there is no compiler, or it refuses.
    """
    compiler = find_compiler("CXX", COMPILERS)
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++ or clang++) on PATH")

    def compiled(each: InstructionSet, source: Path) -> Path:
        library = directory / each.name / f"lib{source.stem}.so"
        return compile_into(library, source, compiler, _flags(each.flags), timeout_s=_IMAGE_TIMEOUT_S)

    jobs = [(each, source) for each in (instruction_sets() if wanted is None else wanted) for source in _SOURCES]
    with _compilers() as at_once:
        return tuple(at_once.map(compiled, *zip(*jobs, strict=True)))


def _built() -> list[Path] | None:
    """The libraries to load: of the image where it carries some, else those that were built on this machine."""
    carried = os.environ.get("ANTIPHON_KERNELS")
    if carried:
        present = tuple(each for each in instruction_sets() if (Path(carried) / each.name).is_dir())
        chosen = newest_usable(present, processor_features())
        if chosen is None:
            logger.warning("%s has no kernels for this processor, the torch path serves", carried)
            return None
        logger.info("kernels for %s", chosen.name)
        return [Path(carried) / chosen.name / f"lib{source.stem}.so" for source in _SOURCES]
    compiler = find_compiler("CXX", COMPILERS)
    return None if compiler is None else [library_path(source, compiler, _flags()) for source in _SOURCES]


@functools.cache
def available() -> bool:
    """Whether this process has the kernels, loading them at the first call."""
    if PRETENDS or os.environ.get("ANTIPHON_NATIVE") == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    libraries = _built()
    if libraries is None:
        return False
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
        arguments = argparse.ArgumentParser()
        arguments.add_argument("--into", type=Path, help="build for every instruction set of this kind of machine")
        directory = arguments.parse_args().into
        say = functools.partial(print, flush=True)  # a command's answer
        if directory is None:
            build_kernels(say)
        else:
            say(*build_for_image(directory), sep="\n")
    except Unavailable as error:
        print(f"kernels are not built: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
