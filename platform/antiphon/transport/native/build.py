"""Compiles the native control channel once per machine and Python, and loads it (control).

The module is cached under ``$ANTIPHON_CACHE/native/<hash of source, flags and Python>``, by default ``~/.cache/antiphon``.
Builders racing each other each write their own file and rename it into place. ``python -m antiphon.transport.native.build``
builds ahead of time, for images. Must not know: what the module does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from antiphon.cache_root import cache_root

_MODULE = "antiphon_channel"
_SOURCE = Path(__file__).with_name(f"{_MODULE}.c")
_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC")
_COMPILE_S = 60.0
_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where built modules are kept."""
    return cache_root() / "native"


def build(cache: Path, compiler: str) -> Path:
    """The compiled module in ``cache``, built with ``compiler`` if it is not there yet.

    Raises OSError or subprocess.SubprocessError when it can't be built there.
    """
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))  # names this Python and this machine
    digest = hashlib.sha256(_SOURCE.read_bytes() + " ".join((*_FLAGS, suffix)).encode()).hexdigest()
    module = cache / digest[:16] / f"{_MODULE}{suffix}"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=module.parent, suffix=".tmp")
    os.close(handle)
    try:
        include = f"-I{sysconfig.get_path('include')}"
        command = [compiler, *_FLAGS, include, "-o", unfinished, str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
        Path(unfinished).chmod(0o755)
        Path(unfinished).replace(module)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return module


@functools.cache
def load() -> ModuleType | None:
    """The module, or None where there is no C compiler or no Python header (said once in the log)."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        _log.warning("no C compiler: shared-memory links use their Python control channel")
        return None
    try:
        try:
            return _import(build(cache_directory(), compiler))
        except (OSError, ImportError) as error:  # a home that can't be written to, or where nothing may be executed
            _log.info("the native control channel can't be cached: %s", error)
            with tempfile.TemporaryDirectory() as private:
                return _import(build(Path(private), compiler))
    except subprocess.CalledProcessError as error:
        why: object = error.stderr
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        why = error
    _log.warning("shared-memory links use their Python control channel: %s", why)
    return None


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(path))
    spec = importlib.util.spec_from_file_location(_MODULE, path, loader=loader)
    assert spec is not None, "a loader was given"
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(0 if load() is not None else 1)
