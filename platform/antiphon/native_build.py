"""Compiles a C or C++ source once per machine and finds the result again (control speed).

A library lies under ``$ANTIPHON_CACHE/native/<digest>``, of its source, the headers beside and above it, flags, compiler and
processor; by default in ``~/.cache/antiphon``.
Builders racing each other each write their own file and rename it into place. Must not know: what libraries do.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from antiphon.cache_root import cache_root
from antiphon.core.errors import Unavailable

COMPILE_TIMEOUT_S = 1800.0  # half a minute where nothing else runs; a loaded machine is given its time


def cache_directory() -> Path:
    """Where built libraries are kept."""
    return cache_root() / "native"


def find_compiler(variable: str, names: Sequence[str]) -> str | None:
    """The compiler that ``variable`` of the environment names, else the first of ``names`` on PATH; None where there is none."""
    return next((found for name in (os.environ.get(variable), *names) if name and (found := shutil.which(name))), None)


def library_path(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    """Where the library of ``source`` lies once it is built on this machine."""
    facts = [*flags, compiler, platform.machine(), platform.libc_ver()[0], _processor_features()]
    headers = sorted((*source.parent.glob("*.h"), *source.parent.parent.glob("*.h")))
    text = b"".join(file.read_bytes() for file in (source, *headers))
    digest = hashlib.sha256(text + "\0".join(facts).encode()).hexdigest()
    return cache_directory() / digest[:16] / f"lib{source.stem}.so"


def build(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    """The built library, compiled now if it is not there yet.

    Raises:
        Unavailable: it can't be compiled or stored; the message has the compiler's words.
    """
    library = library_path(source, compiler, flags)
    return library if library.exists() else compile_into(library, source, compiler, flags)


def compile_into(library: Path, source: Path, compiler: str, flags: Sequence[str], *, timeout_s: float = COMPILE_TIMEOUT_S) -> Path:
    """Compile ``source`` to the file ``library``, which is there whole or not at all.

    Raises:
        Unavailable: it can't be compiled or stored; the message has the compiler's words.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as private:
            unfinished = Path(private) / library.name
            command = [compiler, str(source), "-shared", "-fPIC", "-o", str(unfinished), *flags]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s)
            unfinished.replace(library)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{source.name} does not compile: {error.stderr[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{source.name} took longer than {timeout_s:g} s to compile; a later start tries again") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{source.name} can't be built: {error}") from error
    return library


def _processor_features() -> str:
    """What -march=native depends on; a cache may move to another processor with its home directory."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith("flags")), platform.processor())
