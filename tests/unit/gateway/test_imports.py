"""A gateway starts without what it doesn't need."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_gateway_loads_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "ray", "redis", "numpy", "sklearn", "scipy", "kubernetes"]
    code = f"import sys, antiphon.gateway.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
