"""Prepares a worker process, then becomes it: pins it, ties its life to its supervisor's (control speed, run as a script).

    python -I -S child_launcher.py <parent pid> <cores, comma-separated, or -> <command> ...

It runs between fork and exec, in a fresh process, because code that runs there in a copy of a threaded process can hang.
Must not know: anything of antiphon; it starts in milliseconds because it imports nothing.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _main() -> None:
    parent, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the supervisor's host may have blocked SIGINT
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
        if cores != "-":
            wanted = {int(core) for core in cores.split(",")}
            available = os.sched_getaffinity(0)
            if not wanted <= available:
                missing = ", ".join(map(str, sorted(wanted - available)))
                have = ", ".join(map(str, sorted(available)))
                sys.exit(f"cores: processor {missing} is not available here; this process may use {have}")
            os.sched_setaffinity(0, wanted)
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")
    os.execvp(command[0], command)  # noqa: S606  # a command of our own making


if __name__ == "__main__":
    _main()
