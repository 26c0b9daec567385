"""The directory of a tier process' host copies, often in memory, and how it goes when the process was killed (control speed).

Its process holds a lock on it, which the kernel takes away with the process. A process' id in its name would not do: another may
have it by now, or in another container. Must not know: what lies in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the directories made in it are private
_PREFIX: Final = "antiphon-host-tier-"


class Scratch:
    """A private directory of this process; ``close`` removes it. Idempotent."""

    def __init__(self, base: Path | None = None) -> None:
        """``base``: where it is made; None = where temporary files are. Raises OSError."""
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            lock = _locked(self.path)
            if lock is not None:
                self._lock = lock
                return
            # somebody swept it before it was locked: another

    def close(self) -> None:
        """Remove it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def sweep_scratch(bases: Iterable[Path] | None = None) -> list[Path]:
    """Remove what tier processes left that were killed; what was removed. ``bases``: None = wherever they are made."""
    removed = []
    for base in (SHARED_MEMORY, Path(tempfile.gettempdir())) if bases is None else bases:
        for path in base.glob(f"{_PREFIX}*"):
            lock = _locked(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
                removed.append(path)
    return removed


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a directory of this user; None where another has it, or there is none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found, named = os.fstat(descriptor), path.lstat()
            if found.st_uid == os.geteuid() and (found.st_dev, found.st_ino) == (named.st_dev, named.st_ino):
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
    return None
