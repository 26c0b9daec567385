"""Compiles a C or C++ source once per machine and finds the result again (control speed).

A library lies under ``$ANTIPHON_CACHE/native/<digest>``, of its source, the headers beside and above it, flags, compiler and
processor; by default in ``~/.cache/antiphon``. An extension module of this Python lies there too, under a digest of its own.
Builders racing each other each write their own file and rename it into place. Must not know: what libraries do.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from antiphon.cache_root import cache_root
from antiphon.core.errors import Unavailable

_log = logging.getLogger(__name__)
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


_C_COMPILERS = ("cc", "gcc", "clang")
_EXTENSION_FLAGS = ("-std=gnu11", "-shared", "-fPIC")
_EXTENSION_COMPILE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A module in C for this Python, named as its source. It has a plain twin, so there is none where it can't be built."""

    source: Path
    flags: tuple[str, ...]  # for any processor of this kind of machine: an image is built on another one
    without: str  # what serves instead, for the log

    @property
    def file_name(self) -> str:
        """What the built module is called: it names this Python and this kind of machine."""
        return f"{self.source.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def path(self, cache: Path) -> Path:
        """Where the built module lies in ``cache``."""
        text = b"".join(file.read_bytes() for file in (self.source, *sorted(self.source.parent.glob("*.h"))))
        digest = hashlib.sha256(text + " ".join((*_EXTENSION_FLAGS, *self.flags, self.file_name)).encode()).hexdigest()
        return cache / digest[:16] / self.file_name

    def build(self, cache: Path, compiler: str) -> Path:
        """The module in ``cache``, compiled now if it is not there yet.

        Raises OSError or subprocess.SubprocessError when it can't be built there.
        """
        module = self.path(cache)
        return module if module.exists() else self.compile_into(module, compiler)

    def compile_into(self, module: Path, compiler: str) -> Path:
        """Compile to the file ``module``, which is there whole or not at all.

        Raises OSError or subprocess.SubprocessError when it can't be built there.
        """
        module.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=module.parent, suffix=".tmp")
        os.close(handle)
        try:
            include = f"-I{sysconfig.get_path('include')}"
            command = [compiler, *_EXTENSION_FLAGS, *self.flags, include, "-o", unfinished, str(self.source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_EXTENSION_COMPILE_S)
            Path(unfinished).chmod(0o755)
            Path(unfinished).replace(module)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        return module

    def load(self) -> ModuleType | None:
        """The module: what an image carries, else what this machine has or compiles; None where neither is possible, with a log."""
        carried = Path(os.environ.get("ANTIPHON_KERNELS", "")) / self.file_name
        try:
            if carried.is_absolute() and carried.exists():
                return self._import(carried)
            compiler = find_compiler("CC", _C_COMPILERS)
            if compiler is None:
                _log.warning("no C compiler: %s", self.without)
                return None
            try:
                return self._import(self.build(cache_directory(), compiler))
            except (OSError, ImportError) as error:  # a home that can't be written to, or where nothing may be executed
                _log.info("%s can't be cached: %s", self.source.name, error)
                with tempfile.TemporaryDirectory() as private:
                    return self._import(self.build(Path(private), compiler))
        except subprocess.CalledProcessError as error:
            why: object = error.stderr
        except (OSError, ImportError, subprocess.SubprocessError) as error:
            why = error
        _log.warning("%s: %s", self.without, why)
        return None

    def _import(self, path: Path) -> ModuleType:
        loader = importlib.machinery.ExtensionFileLoader(self.source.stem, str(path))
        spec = importlib.util.spec_from_file_location(self.source.stem, path, loader=loader)
        assert spec is not None, "a loader was given"
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def command(self) -> int:
        """What ``python -m`` of its builder does: build ahead of time, ``--into DIRECTORY`` for an image; its exit status."""
        arguments = argparse.ArgumentParser()
        arguments.add_argument("--into", type=Path, help="build into this directory, which ANTIPHON_KERNELS names where it serves")
        directory = arguments.parse_args().into
        if directory is None:
            return 0 if self.load() is not None else 1
        compiler = find_compiler("CC", _C_COMPILERS)
        if compiler is None:
            raise SystemExit(f"no C compiler: {self.without}")
        try:
            self.compile_into(directory / self.file_name, compiler)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{self.source.name} does not compile: {error.stderr[-2000:]}") from error
        return 0
