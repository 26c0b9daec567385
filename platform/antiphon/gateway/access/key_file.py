"""A key file that may change while it is used: looked at again when its time stamp has (request speed).

A mounted Secret changes by a link's target, an editor's file by its inode: both are seen. What can't be read or parsed leaves the
keys as they were, and is logged once. What was written a moment ago may be half of what will stand there, and a line's first half
may be a line without its limits: it is left for the next look. Must not know: who asks.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from antiphon.core.budget import NO_LIMITS, TenantLimits
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.gateway.access.key_lines import KeyLine, limits_of, parse_lines

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # between two looks; a look is one stat
_SETTLED_S: Final = 0.5  # since it was written, until it is whole
_MAX_BYTES: Final = 4 * 2**20

_Seen = tuple[int, int, int]


class KeyFile:
    """The keys of one file, as they are now. Belongs to one event loop.

    Args:
        path: The file.
        field: Of the document, for what is said about it.
        clock: Monotonic seconds.
        wall: Seconds since 1970, as of time stamps of files.

    Raises:
        Unavailable: it can't be read, or a line of it is wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        field: str = "spec.endpoint.apiKeysFile",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._wall = wall
        self._clock = clock
        self._looked_s = clock()
        self._seen: _Seen | None = None
        try:
            self._seen = _stamp(path)
            self._take(parse_lines(_text(path)))
        except (OSError, ValueError, InvalidInput) as error:
            raise Unavailable(f"{field}: {path}: {error}") from error

    def lines(self) -> tuple[KeyLine, ...]:
        """The keys; the file is looked at when the last look is a second ago."""
        now_s = self._clock()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._look()
        return self._lines

    def limits(self, tenant: str) -> TenantLimits:
        """Those of a tenant, as ``lines`` found them."""
        return self._limits.get(tenant, NO_LIMITS)

    def _take(self, lines: tuple[KeyLine, ...]) -> None:
        self._lines, self._limits = lines, limits_of(lines)

    def _look(self) -> None:
        try:
            seen = _stamp(self._path)
        except OSError as error:
            if self._seen is not None:
                _log.warning("the API keys stay as they are: %s: %s", self._path, error.strerror)
            self._seen = None
            return
        if seen == self._seen or 0 <= self._wall() - seen[0] / 1e9 < _SETTLED_S:
            return
        self._seen = seen
        try:
            self._take(parse_lines(_text(self._path)))
        except (OSError, ValueError, InvalidInput) as error:
            _log.warning("the API keys stay as they are: %s: %s", self._path, error)
            return
        _log.info("%d API keys are accepted now, of %s", len(self._lines), self._path)


def _stamp(path: Path) -> _Seen:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _text(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe of that name is refused, not waited for
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInput("it is no file")
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise InvalidInput(f"it has more than {_MAX_BYTES} bytes")
    return raw.decode()
