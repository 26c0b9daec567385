"""So many drafts are verified as bring tokens per second, by measured costs and acceptance; none where they bring none."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping

import pytest

from antiphon.core.request import RequestId
from antiphon.engine.speculation.controller import LEAST_GAIN, Acceptance, DraftingCosts, RequestAcceptance, StepCosts, choose
from antiphon.engine.speculation.drafter import DraftAsked, Proposal
from antiphon.engine.speculation.speculator import Speculator
from antiphon.testing import FakeClock


def flat(num_rows: int) -> float:
    return 10.0 + 0.1 * num_rows


def steep(num_rows: int) -> float:
    return float(num_rows)


def test_where_rows_cost_nothing_all_likely_drafts_are_taken_and_where_they_cost_their_share_none() -> None:
    assert choose(flat, 1, [[0.9] * 8], 100) == [8]
    assert choose(steep, 1, [[0.9] * 8], 100) == [0]
    assert choose(flat, 1, [[0.0] * 8], 100) == [0]
    assert choose(flat, 4, [], 100) == []


def test_room_goes_to_the_likeliest_drafts() -> None:
    assert choose(flat, 3, [[0.5] * 8, [0.95] * 4, [0.2] * 8], 5) == [1, 4, 0]
    assert choose(flat, 1, [[0.9] * 8], 0) == [0]


def test_the_choice_is_the_best_of_all_choices() -> None:
    chance = random.Random(0)
    for _ in range(100):
        base, row, jump = chance.uniform(1, 20), chance.uniform(0.01, 1), chance.uniform(0, 5)

        def cost(rows: int, base: float = base, row: float = row, jump: float = jump) -> float:
            return base + row * rows + jump * (rows > 8)

        shares = [[chance.random() for _ in range(chance.randint(1, 4))] for _ in range(3)]
        rows, room = 3, chance.randint(0, 12)

        def rate(
            counts: tuple[int, ...],
            rows: int = rows,
            shares: list[list[float]] = shares,
            cost: Callable[[int], float] = cost,
        ) -> float:
            gained = sum(
                math.prod(each[:place], start=1.0) for each, n in zip(shares, counts, strict=True) for place in range(1, n + 1)
            )
            return (rows + gained) / cost(rows + sum(counts))

        possible = [c for c in itertools.product(*(range(len(each) + 1) for each in shares)) if sum(c) <= room]
        best = max(rate(counts) for counts in possible)
        found = tuple(choose(cost, rows, shares, room))
        assert found in possible
        if found == (0, 0, 0):
            assert best <= LEAST_GAIN * rate(found) + 1e-9
        else:
            assert rate(found) == pytest.approx(best)


def test_costs_are_those_measured_between_them_on_a_line_and_beyond_them_growing() -> None:
    costs = StepCosts()
    assert costs.estimate(9) > costs.estimate(1) == 1.0
    costs.note(4, 0.0)  # a clock that stands says nothing
    assert costs.estimate(1) == 1.0
    for _ in range(30):
        costs.note(1, 0.010)
        costs.note(9, 0.014)
    assert costs.estimate(1) == pytest.approx(0.010)
    assert costs.estimate(5) == pytest.approx(0.012)
    assert costs.estimate(9) == pytest.approx(0.014)
    assert costs.estimate(17) > 0.014
    costs.note(9, 3.0)  # somebody else's second
    assert costs.estimate(9) < 0.02
    for rows in (40, 41, 100, 1000):
        costs.note(rows, 0.5)
        assert costs.estimate(rows) > 0.014


def test_one_slow_step_of_a_size_does_not_keep_drafts_from_being_tried() -> None:
    costs = StepCosts()
    for _ in range(30):
        costs.note(8, 0.015)
        costs.note(14, 0.020)
    likely = [[0.9, 0.9]] * 3
    before = choose(costs.estimate, 8, likely, 6)
    costs.note(9, 0.040)  # the first of its size: memory for it was taken
    assert choose(costs.estimate, 8, likely, 6) == before != [0, 0, 0]
    costs.note(9, 0.016)
    assert costs.estimate(9) == pytest.approx(0.016)


def test_a_request_is_judged_by_itself_once_enough_is_seen_and_by_all_before() -> None:
    acceptance = Acceptance((0.3, 0.9))
    good, bad = RequestAcceptance(), RequestAcceptance()
    assert acceptance.share(1, good) == pytest.approx(0.9)
    for _ in range(40):
        acceptance.note((1,) * 4, good, num_taken=4)
        acceptance.note((1,) * 4, bad, num_taken=0)
    assert acceptance.share(1, good) > 0.85
    assert acceptance.share(1, bad) < 0.45
    assert acceptance.share(0, bad) == pytest.approx(0.3)
    for _ in range(60):
        acceptance.note((1,) * 4, good, num_taken=0)
    assert acceptance.share(1, good) < 0.3, "the old fades"


class Repeating:
    """Proposes eights."""

    name, priors = "repeating", (0.5,)

    def __init__(self, *, is_free: bool) -> None:
        self.is_free = is_free
        self.num_proposals = 0

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> dict[RequestId, Proposal]:
        self.num_proposals += len(asked)
        return {request_id: Proposal(token_ids=(8,) * wanted.num_drafts) for request_id, wanted in asked.items()}

    def forget(self, request_id: RequestId) -> None:
        pass


def steps(speculator: Speculator, clock: FakeClock, count: int, *, right: bool, row_s: float) -> list[int]:
    """Steps of one request whose every draft is right or wrong; how many drafts each had."""
    name, sizes = RequestId("r"), []
    for _ in range(count):
        speculator.begin()
        drafts = speculator.plan({name: DraftAsked(token_ids=[1], num_drafts=8)}, 1, 100).get(name, ())
        clock.advance(0.01 + row_s * len(drafts))
        speculator.note({name: (*drafts, 8) if right else (9,)}, len(drafts))
        sizes.append(len(drafts))
    return sizes


@pytest.mark.parametrize("is_free", [True, False])
def test_drafts_that_are_never_taken_stop_and_cost_no_step_much(is_free: bool) -> None:
    clock = FakeClock()
    speculator = Speculator(Repeating(is_free=is_free), max_drafts=8, clock=clock)
    sizes = steps(speculator, clock, 400, right=False, row_s=0.001)
    assert sum(sizes) * 0.001 < 0.03 * 400 * 0.01
    assert sum(sizes[200:]) <= (0 if is_free else 4)


@pytest.mark.parametrize("is_free", [True, False])
def test_drafts_begin_again_when_they_are_worth_it(is_free: bool) -> None:
    clock = FakeClock()
    drafter = Repeating(is_free=is_free)
    speculator = Speculator(drafter, max_drafts=8, clock=clock)
    steps(speculator, clock, 60, right=False, row_s=0.001)
    sizes = steps(speculator, clock, 200, right=True, row_s=0.001)
    assert sizes[-1] == 8
    assert speculator.stats.num_taken > 0.8 * speculator.stats.num_drafts - 60
    speculator.forget(RequestId("r"))
    assert not speculator._requests


def test_drafts_that_were_not_scheduled_count_as_not_used() -> None:
    clock = FakeClock()
    speculator = Speculator(Repeating(is_free=True), max_drafts=3, clock=clock)
    name = RequestId("r")
    speculator.begin()
    assert speculator.plan({name: DraftAsked(token_ids=[1], num_drafts=8)}, 1, 100) == {name: (8, 8, 8)}
    speculator.withdraw(name)
    speculator.note({name: (8,)}, 0)
    assert speculator.stats.num_verifications == speculator.stats.num_drafts == 0


def test_drafts_that_cost_more_to_make_than_they_bring_are_not_made() -> None:
    assert choose(flat, 1, [[0.9] * 8], 100, lambda depth: 0.1 * depth)[0] > 2
    assert choose(flat, 1, [[0.9] * 8], 100, lambda depth: 5.0 * depth) == [3]
    assert choose(flat, 1, [[0.9] * 8], 100, lambda depth: 20.0 * depth) == [0]
    costs = DraftingCosts()
    assert costs.estimate(0, 0.01) == 0.0
    assert costs.estimate(4, 0.01) > costs.estimate(1, 0.01) > 0.0
    for _ in range(20):
        costs.note(2, 0.004)
    assert costs.estimate(2, 0.01) == pytest.approx(0.004)
    assert costs.estimate(4, 0.01) == pytest.approx(0.008)


def test_a_drafter_that_fails_is_not_asked_again_and_nobody_else_notices() -> None:
    class Failing(Repeating):
        def propose(self, asked: Mapping[RequestId, DraftAsked]) -> dict[RequestId, Proposal]:
            self.num_proposals += 1
            raise RuntimeError("out of memory")

    drafter, clock = Failing(is_free=False), FakeClock()
    sizes = steps(Speculator(drafter, max_drafts=8, clock=clock), clock, 40, right=True, row_s=0.0)
    assert sizes == [0] * 40
    assert drafter.num_proposals == 1
