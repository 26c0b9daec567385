"""What one ``antiphon serve`` leaves on its machine while it runs, and how all of it goes (control speed).

One private directory, and processes that are descendants of this one: on Linux orphans among them come back to this process,
so that nothing escapes the last sweep. Must not know: what the processes do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from antiphon.core.errors import Unavailable
from antiphon.core.identity import adopt_file, forget_file, is_given, new_key

_PREFIX = "antiphon"
_PR_SET_CHILD_SUBREAPER = 36
_MAX_BASE_LENGTH = 17  # characters; 90 more make the path of Ray's longest socket, and unix allows 107
_RAY_DIR = "r"  # short, for the same reason
_KEY_FILE = "key"
_RUN_DIR_VARIABLE = "ANTIPHON_RUN_DIR"
_REAPER = str(Path(__file__).parents[1] / "supervision" / "orphan_reaper.py")
_REAPER_EXIT_S = 5.0


def make_run_dir() -> Path:
    """A private directory for logs, sockets and configurations; its short name tells whose it is."""
    base = tempfile.gettempdir()
    if len(base) > _MAX_BASE_LENGTH:
        base = "/tmp"  # noqa: S108  # what is made there is private
    while True:
        path = Path(base) / f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            return path


def ray_dir(run_dir: Path) -> Path:
    """Ray's own directory within ours: Ray opens the directory that it is given to everybody, which must not be ours."""
    path = run_dir / _RAY_DIR
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def give_key(run_dir: Path) -> None:
    """Make the key of this run's parts, unless whoever started this process gave it one; it goes with the run directory."""
    if not is_given():
        path = run_dir / _KEY_FILE
        with os.fdopen(open_private(path), "w") as file:
            file.write(new_key() + "\n")
        adopt_file(path)


def take_key_back(run_dir: Path) -> None:
    """This process has no key any longer, if it was this run's."""
    forget_file(run_dir / _KEY_FILE)


class OrphanReaper:
    """A process that ends what is left of this one should it be killed; ``close`` when it ends by itself. Idempotent."""

    def __init__(self, run_dir: Path) -> None:
        os.environ[_RUN_DIR_VARIABLE] = f"{run_dir}/"  # by which whoever this process starts is known as its own
        read_end, self._write_end = os.pipe()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if sys.platform.startswith("linux"):
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", _REAPER, str(run_dir)],
                    stdin=read_end,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C at the terminal is not its end
                )
        finally:
            os.close(read_end)

    @property
    def pids(self) -> frozenset[int]:
        """Its process, if there is one."""
        return frozenset(() if self._process is None else (self._process.pid,))

    def close(self) -> None:
        """Nothing is left behind: it may go."""
        process, self._process = self._process, None
        os.environ.pop(_RUN_DIR_VARIABLE, None)
        if self._write_end >= 0:
            with contextlib.suppress(OSError):
                os.write(self._write_end, b"x")
            os.close(self._write_end)
            self._write_end = -1
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, ChildProcessError):
                process.wait(_REAPER_EXIT_S)


def check_private(directory: Path) -> None:
    """Raise Unavailable unless ``directory`` is a real directory of this user that nobody else may enter."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Unavailable(
            f"{directory} is not private (mode {stat.S_IMODE(found.st_mode):04o}, user {found.st_uid}): others could replace "
            "what workers are configured with"
        )


def open_private(path: Path, *, append: bool = False) -> int:
    """A descriptor to write ``path``, a file of this user alone; never through a link that somebody put there.

    Without ``append`` the file is a new one, whatever stood there before. Raises OSError.
    """
    if not append:
        path.unlink(missing_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        os.close(descriptor)
        raise PermissionError(f"{path} is not a file of this user alone")
    return descriptor


def sweep_run_dirs(base: Path | None = None) -> list[Path]:
    """Remove run directories of processes that were killed before they could; what was removed."""
    base = Path(tempfile.gettempdir()) if base is None else base
    removed = []
    for path in base.glob(f"{_PREFIX}-*-*"):
        owner = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", path.name)
        if owner is None or psutil.pid_exists(int(owner[1])):
            continue
        with contextlib.suppress(OSError):
            found = path.lstat()  # where everybody may write, a link of that name is a stranger's, and never ours to follow
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                remove_tree(path)
                removed.append(path)
    return removed


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, also while somebody still writes there for a moment."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parents end (Linux; elsewhere nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace_s: float, spared: Collection[int] = ()) -> int:
    """End all descendants but ``spared``: SIGTERM, after ``grace_s`` seconds SIGKILL; 0 = SIGKILL at once. How many there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + grace_s
    give_up = deadline + 5.0
    while running := [process for process in _descendants() if process.pid not in spared]:
        killing = time.monotonic() >= deadline
        for process in running:
            with contextlib.suppress(psutil.Error):
                if killing:
                    process.kill()
                elif process.pid not in seen:
                    process.terminate()
            seen.add(process.pid)
        if time.monotonic() > give_up:
            break
        psutil.wait_procs(running, timeout=0.1)
    return len(seen)


def _descendants() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
