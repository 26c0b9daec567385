"""Copies logs into a directory of the user's while they grow (control speed). Must not know: who writes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from antiphon.apps.serve.host import open_private

_BLOCK_BYTES = 2**20


class LogMirror:
    """Appends to each copy what its source has grown by. Belongs to one thread.

    Args:
        sources: the logs there are now, by the name of their copy.
        directory: where the copies go, files of this user alone, never through a link that somebody left; None = nowhere.
    """

    def __init__(self, sources: Callable[[], Mapping[str, Path]], directory: Path | None) -> None:
        self._sources = sources
        self._directory = directory
        self._copied: dict[str, int] = {}

    def sync(self) -> None:
        """Copy what is new; a directory that is full or gone is no reason to stop serving."""
        if self._directory is None:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            for name, source in self._sources().items():
                self._append(source, self._directory / name, name)

    def _append(self, source: Path, target: Path, name: str) -> None:
        start = self._copied.get(name)
        with source.open("rb") as reading, os.fdopen(open_private(target, append=start is not None), "ab") as writing:
            reading.seek(0 if start is None or start > os.fstat(reading.fileno()).st_size else start)
            while block := reading.read(_BLOCK_BYTES):
                writing.write(block)
            self._copied[name] = reading.tell()
