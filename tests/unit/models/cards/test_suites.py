"""The suites of the cards' paths that need no card, each in a process of its own: what counts as a card is decided at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = Path(__file__).parents[3] / "cards"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("suite", "variable"),
    [
        ("test_values.py", "TRITON_INTERPRET"),
        ("test_builds.py", ""),
        ("test_step.py", "ANTIPHON_PRETEND_CARD"),
        ("test_bench.py", "ANTIPHON_PRETEND_CARD"),
    ],
)
def test_cards_paths_without_a_card(suite: str, variable: str, triton_path: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), *triton_path])}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "ANTIPHON_PRETEND_CARD"):
        environment.pop(name, None)
    if variable:
        environment[variable] = "1"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(SUITES / suite)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False, cwd=SUITES.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
