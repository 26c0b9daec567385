import itertools

import numpy as np
import pytest

from antiphon.coe.training.mapping import Budget, solve
from antiphon.core.errors import InvalidInput


def _best(score, share, cost, memory, budget, general):
    """Every mapping, tried."""
    C, M = score.shape
    share = share / share.sum()
    best = -np.inf
    for mapping in itertools.product(range(M), repeat=C):
        kept = set(mapping) | {general}
        if budget.max_experts is not None and len(kept) > budget.max_experts:
            continue
        if budget.max_memory is not None and sum(memory[m] for m in kept) > budget.max_memory + 1e-9:
            continue
        if budget.max_avg_cost is not None and sum(share[c] * cost[m] for c, m in enumerate(mapping)) > budget.max_avg_cost:
            continue
        best = max(best, sum(share[c] * score[c, m] for c, m in enumerate(mapping)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_program_equals_trying_everything(seed: int) -> None:
    source = np.random.default_rng(seed)
    C, M = int(source.integers(2, 5)), int(source.integers(2, 7))
    score, share = source.random((C, M)), source.random(C) + 0.1
    cost, memory = source.uniform(1, 70, M), source.uniform(1, 50, M)
    budget = Budget(
        max_avg_cost=float(cost.min() + source.random() * np.ptp(cost)) if seed % 2 else None,
        max_memory=float(memory.sum() * 0.6 + memory[0]) if seed % 3 else None,
        max_experts=2 if seed % 4 == 0 else None,
    )
    found = solve(score, share, cost, budget, general=0, memory_M=memory)
    assert found.score == pytest.approx(_best(score, share, cost, memory, budget, 0), abs=1e-9)
    assert found.kept[0]
    assert all(found.kept[m] for m in found.expert_of)


def test_a_budget_that_nothing_keeps_is_refused() -> None:
    with pytest.raises(InvalidInput, match="budget"):
        solve(np.ones((2, 2)), np.ones(2), np.array([5.0, 6.0]), Budget(max_avg_cost=4.0))
