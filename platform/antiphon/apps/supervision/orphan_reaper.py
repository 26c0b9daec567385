"""Ends what a killed ``antiphon serve`` leaves behind, and removes its run directory (control speed, run as a script).

    python -I -S orphan_reaper.py <run directory>     with the read end of a pipe as standard input

A command that ends by itself writes a byte first. End of file without one means that it was killed: its descendants' parents may be
gone too, so they are found by the run directory, which each has in its environment or its arguments. Must not know: anything of
antiphon; it imports next to nothing, and sleeps until then.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

_GIVE_UP_S = 30.0
_QUIET_TURNS = 5  # looks in a row that found nobody


def _leftovers(mark: bytes) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        path = Path("/proc", entry)
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if path.stat().st_uid == os.geteuid() and any(mark in (path / name).read_bytes() for name in ("cmdline", "environ")):
                found.append(int(entry))
    return found


def _main() -> None:
    run_dir = sys.argv[1]
    if os.read(0, 1):
        return
    mark, quiet = run_dir.encode() + b"/", 0
    deadline = time.monotonic() + _GIVE_UP_S
    while quiet < _QUIET_TURNS and time.monotonic() < deadline:
        pids = _leftovers(mark)
        quiet = 0 if pids else quiet + 1
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    _main()
