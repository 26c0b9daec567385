"""Ties a worker process' life to its supervisor's, then becomes the worker (control speed, run as a script).

    python -I -S child_launcher.py <parent pid> <command> ...

It runs between fork and exec, in a fresh process, because code that runs there in a copy of a threaded process can hang.
Must not know: anything of antiphon; it starts in milliseconds because it imports nothing.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the supervisor's host may have blocked SIGINT
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")
    os.execvp(command[0], command)  # noqa: S606  # a command of our own making


if __name__ == "__main__":
    _main()
