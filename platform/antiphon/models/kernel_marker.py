"""Whether kernels were built on this machine, known without importing torch (control speed).

``native.library`` leaves a file whose name changes with everything that the built libraries depend on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

from antiphon.native_build import cache_directory, find_compiler, library_path

COMPILERS = ("c++", "g++", "clang++")
_SOURCES = sorted((Path(__file__).parent / "native").rglob("*.cpp"))
NUM_LIBRARIES = len(_SOURCES)  # one for each


def built_marker() -> Path:
    """The file that is there once this machine's kernels are built."""
    compiler = find_compiler("CXX", COMPILERS) or ""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(str(library_path(source, compiler, (importlib.metadata.version("torch"), sys.prefix))).encode())
    return cache_directory() / f"built-{digest.hexdigest()[:16]}"
