"""Takes the standard streams away from native threads and libraries, and keeps the terminal for us (control speed).

Must not know: what is printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from antiphon.apps.serve.host import open_private


class QuietStreams:
    """While open, what anybody writes to stdout or stderr lands in ``log``; ``terminal`` and ``errors`` are the former two."""

    def __init__(self, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = (os.dup(1), os.dup(2))
        self.terminal: IO[str] = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        self.errors: IO[str] = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
        target = open_private(log, append=True)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        self._open = True

    def close(self) -> None:
        """Give the streams back; idempotent."""
        if not self._open:
            return
        self._open = False
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(self._saved, start=1):
            os.dup2(saved, number)
            os.close(saved)
        for stream in (self.terminal, self.errors):
            stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
