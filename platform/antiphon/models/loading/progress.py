"""How far a download, a conversion or a load is, as a value and in words (control speed). Must not know: terminals.

Downloading org/name: 1.2 of 5.4 GB, 48 MB/s, 88 s left
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LOOK_S: Final = 0.5
_WINDOW_S: Final = 10.0  # what the rate is of
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So much of something is done."""

    what: str  # "Downloading org/name"
    num_bytes: int
    total_bytes: int | None = None  # None = nobody knows


Watch = Callable[[Amount], None]


class Pace:
    """Puts amounts into words; each ``what`` has a pace of its own.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, list[tuple[float, int]]] = {}

    def words(self, amount: Amount) -> str:
        """Bytes, rate and time left, as far as they are known."""
        now_s = self._clock()
        seen = self._seen.setdefault(amount.what, [])
        seen.append((now_s, amount.num_bytes))
        while len(seen) > 2 and seen[1][0] < now_s - _WINDOW_S:
            del seen[0]
        (then_s, then_bytes), total = seen[0], amount.total_bytes
        rate = (amount.num_bytes - then_bytes) / (now_s - then_s) if now_s > then_s else 0.0
        text = f"{amount.what}: {size(amount.num_bytes)}"
        if total is not None:
            text += f" of {size(total)}"
        if rate > 0:
            text += f", {size(rate)}/s"
            if total is not None and total > amount.num_bytes:
                text += f", {duration((total - amount.num_bytes) / rate)} left"
        return text


def size(num_bytes: float) -> str:
    """12 MB, 1.2 GB: two digits that matter."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(_UNITS) - 1:
        num_bytes /= 1000
        unit += 1
    return f"{num_bytes:.1f} {_UNITS[unit]}" if unit and num_bytes < 9.95 else f"{num_bytes:.0f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """42 s, 3 min, 2 h 5 min."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def watched(what: str, num_bytes: Callable[[], int], total_bytes: Callable[[], int | None], watch: Watch | None) -> Iterator[None]:
    """Look at a quantity that grows while the block runs, twice a second, on a thread of its own.

    Args:
        what: see ``Amount``.
        num_bytes: what is done.
        total_bytes: what there is to do; may find out later.
        watch: gets the amounts; None = nobody looks.
    """
    if watch is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_S):
            total, found = total_bytes(), num_bytes()
            watch(Amount(what=what, num_bytes=found if total is None else min(found, total), total_bytes=total))

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def bytes_below(folder: Path) -> int:
    """What the files of a folder take, those that are being written included; holes don't count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # moved while we look
            continue
        total += min(status.st_size, status.st_blocks * 512)
    return total
