"""The choice of ubatches, against a simulated two-stage ring: attention and FFN take turns on every ubatch of every layer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.worker.ubatches.plan import Half, plan_ops
from antiphon.worker.ubatches.tuning import TRIES, LaneTuner, Trial, UbatchTuner, candidates, pick, ubatches_to_hide


def step_s(num_ubatches: int, attention_s: float, ffn_s: float, transfer_s: float, num_layers: int = 40) -> float:
    """A step's time by walking through its plan: one attention worker, one FFN worker that serves in order of arrival."""
    now = ffn_free = 0.0
    back: dict[int, float] = {}
    for op in plan_ops(num_layers, num_ubatches):
        if op.half is Half.ATTEND:
            now += attention_s
            ffn_free = max(ffn_free, now + transfer_s) + ffn_s
            back[op.ubatch] = ffn_free + transfer_s
        else:
            now = max(now, back[op.ubatch])
    return now


@given(st.floats(0.1, 10.0), st.floats(0.0, 10.0))
def test_the_rule_gives_the_fewest_ubatches_that_hide_the_ffn_side_where_both_take_as_long(
    stage_s: float, transfer_s: float
) -> None:
    needed = ubatches_to_hide(stage_s, transfer_s)
    busy = step_s(needed, stage_s, stage_s, transfer_s) / (40 * needed * stage_s)
    assert busy < 1.0 + 2 * (1 + transfer_s / stage_s) / 40 + 1e-6, "nothing but the first and the last layer's way is paid"
    if needed - 1 < 2 * (1 + transfer_s / stage_s) - 1e-6:
        idle = step_s(needed - 1, stage_s, stage_s, transfer_s) / (40 * (needed - 1) * stage_s)
        assert idle > 1.0 + 1e-9


def test_candidates_keep_to_rows_slots_and_what_can_pay() -> None:
    assert list(candidates(1, 4, 1.0, 1.0)) == [1]
    assert list(candidates(100, 4, 1.0, 0.0)) == [1, 2]
    assert list(candidates(100, 4, 1.0, 0.4)) == [1, 2, 3]
    assert list(candidates(100, 4, 1.0, 9.0)) == [1, 2, 3, 4]
    assert list(candidates(3, 8, 1.0, 9.0)) == [1, 2, 3]
    assert list(candidates(100, 4, 0.0, 0.0)) == [1, 2], "before anything is measured"


def test_untried_choices_come_first_then_the_fastest() -> None:
    trials: dict[int, Trial] = {}
    taken = []
    for step in range(1, 2 * TRIES + 1):
        choice = pick(trials, (1, 2), step)
        taken.append(choice)
        trials.setdefault(choice, Trial()).times_s.append({1: 3.0, 2: 2.0}[choice])
    assert taken == [1] * TRIES + [2] * TRIES
    assert pick(trials, (1, 2), 2 * TRIES + 1) == 2


def test_no_more_are_tried_once_one_more_was_slower() -> None:
    times_s = {1: 2.0, 2: 3.0, 3: 9.0, 4: 9.0}
    trials: dict[int, Trial] = {}
    for step in range(1, 40):
        choice = pick(trials, (1, 2, 3, 4), step)
        trials.setdefault(choice, Trial()).times_s.append(times_s[choice])
    assert set(trials) == {1, 2}
    assert choice == 1


def test_one_slow_step_does_not_turn_the_choice() -> None:
    trials = {1: Trial(), 2: Trial()}
    trials[1].times_s.extend([3.0] * 5)
    trials[2].times_s.extend([2.0, 2.0, 90.0, 2.0, 2.0])
    assert pick(trials, (1, 2), 5) == 2


@pytest.mark.parametrize("transfer_s", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("per_row_s", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("num_rows", [1, 4, 32, 96])
def test_the_tuner_settles_on_what_brute_force_finds_fastest(num_rows: int, per_row_s: float, transfer_s: float) -> None:
    """Both halves cost 1 per ubatch and ``per_row_s`` per row: few rows are not worth splitting, many are."""

    def took(num_ubatches: int) -> float:
        half = 1.0 + per_row_s * num_rows / num_ubatches
        return step_s(num_ubatches, half, half, transfer_s)

    tuner, chance = UbatchTuner(4), random.Random(3)
    chosen = []
    for _ in range(60):
        choice = tuner.choose(num_rows, is_decode=True)
        chosen.append(choice)
        half = 1.0 + per_row_s * num_rows / choice
        tuner.note(
            num_rows,
            choice,
            is_decode=True,
            step_s=took(choice) * chance.uniform(0.98, 1.02),
            t_ffn_s=half,
            t_transfer_s=transfer_s,
        )
    best = min(took(m) for m in candidates(num_rows, 4, 1.0 + per_row_s * num_rows, transfer_s))
    assert took(chosen[-1]) <= 1.05 * best


def test_a_change_of_load_is_noticed() -> None:
    tuner = UbatchTuner(2)

    def run(num_steps: int, times_s: dict[int, float]) -> list[int]:
        chosen = []
        for _ in range(num_steps):
            choice = tuner.choose(32, is_decode=True)
            chosen.append(choice)
            tuner.note(32, choice, is_decode=True, step_s=times_s[choice], t_ffn_s=1.0, t_transfer_s=0.0)
        return chosen

    assert run(50, {1: 2.0, 2: 1.5})[-1] == 2
    assert run(1500, {1: 2.0, 2: 2.5})[-1] == 1


def test_prompt_chunks_and_decodes_of_one_size_are_told_apart() -> None:
    tuner = UbatchTuner(2)
    for _ in range(20):
        for is_decode, times_s in ((True, {1: 1.0, 2: 2.0}), (False, {1: 2.0, 2: 1.0})):
            choice = tuner.choose(64, is_decode=is_decode)
            tuner.note(64, choice, is_decode=is_decode, step_s=times_s[choice], t_ffn_s=1.0, t_transfer_s=0.0)
    assert tuner.choose(64, is_decode=True) == 1
    assert tuner.choose(64, is_decode=False) == 2


class Clocked:
    """A worker whose rounds take what ``seconds`` says for each number of lanes; the first two with a number take twice that."""

    def __init__(self, limit: int, seconds: dict[int, float]) -> None:
        self.tuner, self.seconds = LaneTuner(limit), seconds
        self.now = 0.0
        self.chosen: list[int] = []
        self.flying = self.rounds = 0

    def run(self, num_rounds: int, num_requests: int = 16) -> None:
        for _ in range(num_rounds):
            lanes = self.tuner.choose(num_requests)
            if lanes != self.flying:
                self.flying, self.rounds = lanes, 0
                if lanes > 1:
                    self.tuner.begin()
            self.chosen.append(lanes)
            self.rounds += 1
            took = self.seconds[lanes] * (2.0 if lanes > 1 and self.rounds <= 2 else 1.0)
            if lanes == 1:
                self.tuner.executed(num_requests, self.now, self.now + took)
                self.now += took
                continue
            for lane in range(lanes):
                if lane:
                    assert self.tuner.choose(num_requests) == lanes, "a round is not cut short"
                self.now += took / lanes
                self.tuner.collected(num_requests // lanes, self.now)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 4.0, 2: 3.0, 3: 2.5, 4: 2.8}, 3),
        ({1: 2.0, 2: 3.0, 3: 1.0, 4: 1.0}, 1),
        ({1: 4.0, 2: 3.95, 3: 3.9, 4: 3.9}, 1),  # not clearly
        ({1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0}, 4),
    ],
)
def test_lanes_go_up_for_as_long_as_that_is_faster(seconds: dict[int, float], best: int) -> None:
    worker = Clocked(4, seconds)
    worker.run(80)
    assert worker.chosen[-20:] == [best] * 20


def test_whole_steps_are_judged_by_the_ubatches_they_settle_on() -> None:
    tuner, now = LaneTuner(2), 0.0
    for number in range(12):  # slow until their own number of ubatches is found
        assert tuner.choose(16) == 1
        took = 9.0 if number < 8 else 2.0
        tuner.executed(16, now, now + took)
        now += took
    assert tuner.choose(16) == 2
    tuner.begin()
    for _ in range(14):
        if tuner.choose(16) == 1:
            return
        now += 1.0
        tuner.collected(8, now)  # a round takes as long as a whole step does now
    raise AssertionError("lanes that are no faster are kept")


def test_a_batch_too_small_for_lanes_runs_whole() -> None:
    worker = Clocked(4, {1: 4.0})
    worker.run(5, num_requests=7)
    assert set(worker.chosen) == {1}


def test_rounds_that_a_prompt_came_between_do_not_count() -> None:
    tuner = LaneTuner(2)
    for start in range(20):
        if tuner.choose(8) == 2:
            break
        tuner.executed(8, float(start), start + 1.0)
    else:
        raise AssertionError("lanes are never tried")
    for begun in (3.0, 100.0, 200.0):  # never more than two rounds before the lanes have to land
        tuner.begin()
        for now in (1.0, 2.0, 3.0, 4.0):
            assert tuner.choose(8) == 2
            tuner.collected(4, begun + now)
    assert tuner.choose(8) == 2, "still not known"
