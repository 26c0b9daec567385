"""Kernels before workers: built at the first start, with a line that says so (control speed).

Workers load what is built and go on without, several times slower; here somebody sees it. Must not know: what kernels compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from antiphon.models.kernel_marker import COMPILERS, built_marker
from antiphon.native_build import find_compiler

_MODULE = "antiphon.models.native.library"
_BUILD_S = 600.0
COST = "models run on torch alone, several times slower"


def kernels_missing() -> str | None:
    """Why there are no kernels yet, in words; None = they were built on this machine, came with the image, or are turned off."""
    if os.environ.get("ANTIPHON_NATIVE") == "0" or os.environ.get("ANTIPHON_KERNELS") or built_marker().exists():
        return None
    if find_compiler("CXX", COMPILERS) is None:
        return "there is no C++ compiler (c++, g++ or clang++): install g++"
    return f"they are not built: python -m {_MODULE}"


def ensure_kernels(say: Callable[[str], None]) -> None:
    """Build the kernels unless they are; where they can't be, say what it costs and go on."""
    if kernels_missing() is None:
        return
    if find_compiler("CXX", COMPILERS) is None:
        say(f"No kernels, {COST}: {kernels_missing()}")
        return
    say("Building kernels for this processor: once, about half a minute")
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE], capture_output=True, text=True, timeout=_BUILD_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"No kernels, {COST}: {error}")
        return
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        say(f"No kernels, {COST}: {words[-1][:300] if words else 'the build failed'}")
        return
