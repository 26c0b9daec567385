"""Machines without the compiled kernels get the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_every_wiring_gives_the_same_tokens_without_the_kernels() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(here / "test_wirings.py"), "-p", "no:cacheprovider", "-k", "mixed and qwen3"]
    result = subprocess.run(
        command, env={**os.environ, "ANTIPHON_NATIVE": "0"}, cwd=here.parents[1], capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "7 passed" in result.stdout, result.stdout[-500:]
