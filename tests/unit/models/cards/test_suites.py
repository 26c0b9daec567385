"""The suites of the cards' paths that need no card, each in processes of their own: what counts as a card is decided at import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SUITES = Path(__file__).parents[3] / "cards"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("suite", "variable"), [("test_values.py", "TRITON_INTERPRET"), ("test_builds.py", "")])
def test_kernels_without_a_card(suite: str, variable: str, triton_path: list[str], tmp_path: Path) -> None:
    passes((suite,), variable, triton_path, tmp_path)


# One process for all: to start one takes as long as most of them. The first of them forks, which is best done before anything else.
STEPS = ("test_links.py", "test_step.py", "test_graphs.py", "test_overlap.py", "test_room.py", "test_split.py", "test_bench.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_of_a_card_without_one(tmp_path: Path) -> None:
    assert {path.name for path in SUITES.glob("test_*.py")} == {*STEPS, "test_values.py", "test_builds.py"}, (
        "a suite is run by nobody"
    )
    passes(STEPS, "ANTIPHON_PRETEND_CARD", [], tmp_path)


def passes(suites: Sequence[str], variable: str, paths: list[str], folder: Path) -> None:
    """The suites, in one process with ``variable`` set and ``paths`` to import from."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), *paths])}
    environment |= {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "ANTIPHON_PRETEND_CARD"):
        environment.pop(name, None)
    if variable:
        environment[variable] = "1"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *(str(SUITES / suite) for suite in suites)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False, cwd=SUITES.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
