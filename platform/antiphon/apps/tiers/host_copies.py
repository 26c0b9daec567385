"""Copies of checkpoints in a directory that lies in memory: made whole or not at all (control speed).

Must not know: engines, who decides what is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from antiphon.core.errors import CheckpointInvalid

_COPY_BYTES = 8 << 20


class HostCopies:
    """Owns ``directory``. Safe from several threads for different experts.

    Args:
        checkpoints: directory of each expert's model.
        forget_pages: drop a file from the page cache after it was copied, so that "on disk" means the disk.
    """

    def __init__(self, checkpoints: Mapping[str, Path], directory: Path, *, forget_pages: bool) -> None:
        self._checkpoints = dict(checkpoints)
        self._directory = directory
        self._forget_pages = forget_pages

    @property
    def names(self) -> tuple[str, ...]:
        """Experts with a copy."""
        return tuple(name for name in self._checkpoints if self.path(name).is_dir())

    def path(self, expert: str) -> Path:
        """Where an expert's copy is, or would be."""
        return self._directory / expert

    def make(self, expert: str) -> None:
        """Copy an expert's checkpoint. Raises CheckpointInvalid where that fails."""
        source, to = self._checkpoints[expert], self.path(expert)
        partial = self._directory / f".{expert}.part"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in sorted(source.iterdir()):
                if path.is_file():
                    _copy_file(path, partial / path.name, forget=self._forget_pages)
            shutil.rmtree(to, ignore_errors=True)
            partial.rename(to)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointInvalid(f"expert {expert} can't be copied from {source}: {error}") from error

    def drop(self, names: Sequence[str]) -> None:
        """Delete copies, where they are."""
        for name in names:
            shutil.rmtree(self.path(name), ignore_errors=True)


def _copy_file(source: Path, to: Path, *, forget: bool) -> None:
    with source.open("rb") as reader, to.open("wb") as writer:
        if forget:
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := reader.read(_COPY_BYTES):
            writer.write(data)
        if forget:
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
