"""Compiles the fast path of routing decisions once per machine and Python, and loads it (control).

``python -m antiphon.coe.routing.native.build`` builds ahead of time, with ``--into DIRECTORY`` for images. ANTIPHON_NATIVE=0 turns
it off, as it does kernels. Must not know: what the module does.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType

from antiphon.native_build import Extension

ROUTER = Extension(
    source=Path(__file__).with_name("antiphon_router.c"),
    flags=("-O3",),  # sums keep their order
    without="routing decisions take their Python path, some twice as long",
)


@functools.cache
def load() -> ModuleType | None:
    """The module, or None where it is turned off, or there is no C compiler or no Python header (said once in the log)."""
    return None if os.environ.get("ANTIPHON_NATIVE") == "0" else ROUTER.load()


if __name__ == "__main__":
    raise SystemExit(ROUTER.command())
