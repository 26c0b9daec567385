"""The threads that compute together: whoever asks, and whatever becomes of the helpers, every part is computed once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from antiphon.core.errors import Unavailable
from antiphon.models.native.library import available, build_kernels


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    try:
        build_kernels()
    except Unavailable as error:
        pytest.skip(f"the kernels can't be compiled here: {error}")
    if not available():
        pytest.skip("the kernels are not built here")


def norm(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.antiphon.rms_norm(x, torch.ones(x.shape[1]), 1e-6, 0.0)
    return out


def reference(x: torch.Tensor) -> torch.Tensor:
    return x / (x.double().pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt().float()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 15, 33, 400])
def test_any_number_of_threads_does_all_of_the_work(threads: int, rows: int) -> None:
    torch.manual_seed(rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(50):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(norm(x), reference(x))
    finally:
        torch.set_num_threads(before)


def test_two_threads_that_ask_at_once_both_get_their_own_answers() -> None:
    wrong: list[int] = []

    def ask(seed: int) -> None:
        torch.set_num_threads(3)
        generator = torch.Generator().manual_seed(seed)
        for turn in range(300):
            x = torch.randn(200, 64, generator=generator)
            if not torch.allclose(norm(x), reference(x), atol=1e-5):
                wrong.append(turn)

    before = torch.get_num_threads()
    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
        assert not asker.is_alive()
    torch.set_num_threads(before)
    assert wrong == []


_FORK = """
import os, sys, torch
from antiphon.models.native.library import available
assert available()
torch.set_num_threads(2)
x = torch.randn(400, 64)
ask = lambda: torch.ops.antiphon.rms_norm(x, torch.ones(64), 1e-6, 0.0)
expected = ask()
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(ask(), expected) for _ in range(100)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_no_helpers_and_computes_by_itself() -> None:
    assert subprocess.run([sys.executable, "-c", _FORK], timeout=120).returncode == 0
