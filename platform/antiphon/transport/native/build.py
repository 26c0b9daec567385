"""Compiles the native lane once per machine and loads it (control).

The library is cached under ``$ANTIPHON_CACHE/native/<hash of source and flags>``, by default ``~/.cache/antiphon``. Builders
racing each other each write their own file and rename it into place. ``python -m antiphon.transport.native.build`` builds
ahead of time, for images. Must not know: what the library does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("lane.c")
_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC")
_COMPILE_S = 60.0
_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("ANTIPHON_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "antiphon") / "native"


def build(cache: Path, compiler: str) -> Path:
    """The compiled library in ``cache``, built with ``compiler`` if it is not there yet.

    Raises OSError or subprocess.SubprocessError when it can't be built there.
    """
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + " ".join((*_FLAGS, platform.machine(), platform.libc_ver()[0])).encode())
    library = cache / digest.hexdigest()[:16] / "liblane.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-o", unfinished, str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
        Path(unfinished).chmod(0o755)
        Path(unfinished).replace(library)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


@functools.cache
def load() -> ctypes.PyDLL | None:
    """The library, its calls holding the GIL, or None where there is no compiler (said once in the log)."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        _log.warning("no C compiler: shared-memory links use their slower Python lane")
        return None
    try:
        try:
            return ctypes.PyDLL(str(build(cache_directory(), compiler)))
        except OSError as error:  # a home that can't be written to, or from which nothing may be executed
            _log.info("the native lane can't be cached: %s", error)
            with tempfile.TemporaryDirectory() as private:
                return ctypes.PyDLL(str(build(Path(private), compiler)))
    except subprocess.CalledProcessError as error:
        why: object = error.stderr
    except (OSError, subprocess.SubprocessError) as error:
        why = error
    _log.warning("shared-memory links use their slower Python lane: %s", why)
    return None


if __name__ == "__main__":
    raise SystemExit(0 if load() is not None else 1)
