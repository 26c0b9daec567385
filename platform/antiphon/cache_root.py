"""Where this machine keeps what was fetched, converted or compiled once: ``models/``, ``native/``, ``coe/`` (control speed).

Must not know: what is kept there.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "ANTIPHON_CACHE"


def cache_root() -> Path:
    """$ANTIPHON_CACHE, or ~/.cache/antiphon; it need not exist yet."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "antiphon"
