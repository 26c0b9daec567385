"""Compiles the native control channel once per machine and Python, and loads it (control).

``python -m antiphon.transport.native.build`` builds ahead of time, with ``--into DIRECTORY`` for images. Must not know: what the
module does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from antiphon.native_build import Extension

CHANNEL = Extension(
    source=Path(__file__).with_name("antiphon_channel.c"),
    flags=("-O2",),
    without="shared-memory links use their Python control channel",
)


@functools.cache
def load() -> ModuleType | None:
    """The module, or None where there is no C compiler or no Python header (said once in the log)."""
    return CHANNEL.load()


if __name__ == "__main__":
    raise SystemExit(CHANNEL.command())
