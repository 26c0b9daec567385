"""Kernels before workers: built at the first start, with a line that says so (control speed).

Workers load what is built and go on without, several times slower; here somebody sees it. Must not know: what kernels compute.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import antiphon
from antiphon.native_build import cache_directory, find_compiler, library_path

_MODULE = "antiphon.models.native.library"
_DIRECTORY = Path(antiphon.__file__).parent / "models" / "native"
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_S = 600.0
COST = "models run on torch alone, several times slower"


def kernels_missing() -> str | None:
    """Why there are no kernels yet, in words; None = they were built on this machine, or are turned off."""
    if os.environ.get("ANTIPHON_NATIVE") == "0" or _marker().exists():
        return None
    if find_compiler("CXX", _COMPILERS) is None:
        return "there is no C++ compiler (c++, g++ or clang++): install g++"
    return f"they are not built: python -m {_MODULE}"


def ensure_kernels(say: Callable[[str], None]) -> None:
    """Build the kernels unless they are; where they can't be, say what it costs and go on."""
    if kernels_missing() is None:
        return
    if find_compiler("CXX", _COMPILERS) is None:
        say(f"No kernels, {COST}: {kernels_missing()}")
        return
    say("Building kernels for this processor: once, about half a minute")
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE], capture_output=True, text=True, timeout=_BUILD_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"No kernels, {COST}: {error}")
        return
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        say(f"No kernels, {COST}: {words[-1][:300] if words else 'the build failed'}")
        return
    marker = _marker()
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _marker() -> Path:
    """A file whose name changes with everything the built libraries depend on: torch need not be imported to know."""
    compiler = find_compiler("CXX", _COMPILERS) or ""
    digest = hashlib.sha256()
    for source in sorted(_DIRECTORY.glob("*.cpp")):
        digest.update(str(library_path(source, compiler, (importlib.metadata.version("torch"), sys.prefix))).encode())
    return cache_directory() / f"built-{digest.hexdigest()[:16]}"
