"""What ``make gpu`` does, on a CPU that is taken for a card (``ANTIPHON_PRETEND_CARD=1``) and a model small enough for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_card import FakeCard

from antiphon.apps.bench import card_split
from antiphon.apps.bench.card import Bench, Shape, run_sections, suite
from antiphon.device.driver import look_for_cards
from antiphon.device.memory import CardMemory

SHAPE = Shape(name="tiny", hidden=32, width=48, heads=4, kv_heads=2, dim=8, layers=2, vocab=97)


@pytest.fixture(scope="module")
def bench() -> Bench:
    made = Bench(device=torch.device("cpu"), repeats=2)
    made.ceilings(num_bytes=1 << 20, side=64)
    return made


def test_shares_are_of_what_was_measured(bench: Bench) -> None:
    assert "batch 3: " in bench.decode(SHAPE, (1, 3), 32)
    assert "of the matrix rate" in bench.prefill(SHAPE, 64)
    decode, prefill = bench.found["decode tiny, batch 3"], bench.found["prefill tiny"]
    num_bytes = 2 * (SHAPE.num_weights + 3 * 32 * SHAPE.kv_numbers)
    assert decode["share_of_copy"]["graph"] == pytest.approx(num_bytes / decode["graph_s"] / bench.copy_bytes_per_s)
    assert prefill["share_of_matrix_rate"] > 0


def test_the_same_shape_is_measured_in_transformers(bench: Bench) -> None:
    bench.decode(SHAPE, (1,), 32)
    assert "x ours" in bench.transformers(SHAPE, (1,), 8, num_tokens=2)


@pytest.mark.parametrize("num_ubatches", [1, 2])
def test_halves_apart_are_measured_as_shares_of_the_bytes_they_read(bench: Bench, num_ubatches: int) -> None:
    assert "of copy" in card_split.inline(bench, SHAPE, 4, 32, num_ubatches)
    found = bench.found[f"1A1F inline tiny, batch 4, {num_ubatches} ubatches"]
    weights = SHAPE.num_weights - SHAPE.vocab * SHAPE.hidden
    num_bytes = 2 * (num_ubatches * weights + 4 * 32 * SHAPE.kv_numbers)
    assert found["share_of_copy"] == pytest.approx(num_bytes / found["step_s"] / bench.copy_bytes_per_s)


def test_an_ffn_process_is_measured_and_killed_without_a_row_changed(bench: Bench) -> None:
    assert "an exchange" in card_split.processes(bench, SHAPE, 4, 32, 2, with_flags=True)
    assert "no row changed" in card_split.kill(bench, SHAPE, 4, 32)
    assert bench.found["1A1F kill tiny"]["resent"] + bench.found["1A1F kill tiny"]["repeats"] > 0


def test_an_engine_decides_ahead_and_gives_the_tokens_of_steps_in_turn(bench: Bench) -> None:
    assert "batch 2: " in bench.engine(SHAPE, (2,), 32, num_tokens=6)
    found = bench.found["engine tiny, batch 2"]
    assert found["steps_ahead"] > 0
    assert found["num_blocks"] > 0
    assert found["share_of_copy"]["ahead"] > 0


def test_an_engine_of_the_bench_takes_what_the_card_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cpu")
    monkeypatch.setattr(bench, "memory", CardMemory(device=where, share=0.5, field="make gpu"))
    with FakeCard(total=64 << 20).answer(monkeypatch):
        bench.engine(SHAPE, (2,), 32, num_tokens=4)
    assert bench.found["engine tiny, batch 2"]["cache_bytes"] > 8 << 20


def test_a_section_that_fails_says_so_and_ends_no_other() -> None:
    said: list[str] = []

    def fails() -> str:
        raise RuntimeError("out of memory")

    failed = run_sections([("first", fails), ("second", lambda: "fine")], said.append)
    assert failed == {"first": "RuntimeError: out of memory"}
    assert said[0].startswith("first: FAILED: RuntimeError: out of memory")
    assert said[1].startswith("second: fine")


def test_a_suite_that_fails_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="not_there"):
        suite(["tests/not_there.py"])


def test_a_machine_without_a_card_is_told_so_in_one_line() -> None:
    if look_for_cards().cards:
        pytest.skip("this machine has a card: make gpu runs")
    command = [sys.executable, "-m", "antiphon.apps.bench.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("make gpu: this machine has no NVIDIA driver")
