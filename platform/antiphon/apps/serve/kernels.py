"""Kernels before workers: built at the first start, with a line that says so (control speed).

Workers load what is built and go on without, several times slower; here somebody sees it. Must not know: what kernels compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

from antiphon.models.kernel_marker import COMPILERS, NUM_LIBRARIES, built_marker
from antiphon.native_build import find_compiler

_MODULE = "antiphon.models.native.library"
_BUILD_S = 3600.0  # half a minute on an idle machine; whoever waits sees how far it is
COST = "models run on torch alone, several times slower"
SWITCH = "ANTIPHON_NATIVE"


def kernels_are_off() -> bool:
    """Whether whoever started this wants none."""
    return os.environ.get(SWITCH) == "0"


def no_compiler() -> str | None:
    """What to do where kernels would be built and nothing can build them; None = they are there, turned off, or can be built."""
    if kernels_are_off() or kernels_missing() is None or find_compiler("CXX", COMPILERS) is not None:
        return None
    return (
        f"no C++ compiler ({', '.join(COMPILERS[:-1])} or {COMPILERS[-1]}) on PATH builds them: `apt-get install g++`, "
        f"or {SWITCH}=0 to go without: {COST}"
    )


def kernels_missing() -> str | None:
    """Why there are no kernels, in words; None = they were built on this machine, or came with the image."""
    if kernels_are_off():
        return f"{SWITCH}=0 turns them off"
    try:
        if os.environ.get("ANTIPHON_KERNELS") or built_marker().exists():
            return None
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}; ANTIPHON_CACHE names another directory for them"
    if find_compiler("CXX", COMPILERS) is None:
        return "there is no C++ compiler (c++, g++ or clang++): install g++"
    return f"they are not built: python -m {_MODULE}"


def ensure_kernels(say: Callable[[str], None]) -> None:
    """Build the kernels unless they are; where they can't be, say what it costs and go on."""
    why = kernels_missing()
    if why is None:
        return
    if kernels_are_off() or find_compiler("CXX", COMPILERS) is None:
        say(f"No kernels, {COST}: {why}")
        return
    say("Building kernels for this processor: once, about half a minute")
    try:
        failed = _build(say)
    except OSError as error:
        failed = str(error)
    if failed is not None:
        say(f"No kernels, {COST}: {failed[:300]}")


def _build(say: Callable[[str], None]) -> str | None:
    """What kept the kernels from being built. The command prints a line for each library, and last what went wrong."""
    command = [sys.executable, "-m", _MODULE]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    late = threading.Timer(_BUILD_S, process.kill)
    late.start()
    num_done, words = 0, f"not built within {_BUILD_S:g} s"
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.rstrip().endswith(".so"):
                num_done += 1
                say(f"Building kernels for this processor: {num_done} of {NUM_LIBRARIES}")
            elif line.strip():
                words = line.strip()
        return None if process.wait() == 0 else words
    finally:  # a signal ends the start
        late.cancel()
        process.kill()
        process.wait()
