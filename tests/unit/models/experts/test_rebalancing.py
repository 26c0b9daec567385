"""Decisions to move experts: only where it pays, in steps of bounded memory, keeping what is held."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.models.config import DecoderConfig
from antiphon.models.experts.balance import balance, imbalance
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.rebalancing import BalancePolicy, decide, renumbered, since, stages
from antiphon.models.families import describe

EXPERTS = 8
SKEWED = [900, 600, 100, 50, 20, 10, 5, 5]


def model(**changes: Any) -> DecoderConfig:
    return describe(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 8,
            "moe_intermediate_size": 10,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "vocab_size": 10,
            "max_position_embeddings": 16,
            "mlp_only_layers": [1],
            **changes,
        }
    )


CONFIG = model()
SPREAD = ExpertPlacement.spread(CONFIG, 2)
POLICY = BalancePolicy(min_rows=100)


def test_a_skewed_layer_is_balanced_and_an_even_one_stays() -> None:
    found = decide(CONFIG, SPREAD, {0: SKEWED, 2: [100] * EXPERTS}, POLICY)
    assert found is not None
    assert imbalance(SKEWED, found.groups[0], 2) < imbalance(SKEWED, SPREAD.groups[0], 2)
    assert found.groups[1:] == SPREAD.groups[1:]


@pytest.mark.parametrize(
    ("rows", "policy"),
    [
        ([60, 50, 50, 50, 50, 50, 50, 50], POLICY),  # under the threshold
        (SKEWED, BalancePolicy(min_rows=10_000)),  # too few rows to tell
        ([1000, 0, 0, 0, 0, 0, 0, 0], POLICY),  # one expert has all: nothing helps but a copy
        ([0] * EXPERTS, BalancePolicy(min_rows=1)),
    ],
)
def test_nothing_moves_where_it_does_not_pay(rows: list[int], policy: BalancePolicy) -> None:
    assert decide(CONFIG, SPREAD, {0: rows}, policy) is None


def test_an_expert_with_all_rows_gets_its_copy() -> None:
    found = decide(CONFIG, SPREAD, {0: [1000] + [0] * 7}, BalancePolicy(min_rows=1, num_redundant=1))
    assert found is not None
    assert found.groups[0][0] == (0, 1)


def test_the_same_load_moves_nothing_twice() -> None:
    found = decide(CONFIG, SPREAD, {0: SKEWED}, POLICY)
    assert found is not None
    assert decide(CONFIG, found, {0: SKEWED}, POLICY) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(0, 4))
def test_groups_are_numbered_to_keep_what_they_hold(seed: int, num_groups: int, redundant: int) -> None:
    chance = random.Random(seed)
    held = balance([chance.random() for _ in range(EXPERTS)], num_groups, redundant)
    rows = [chance.random() for _ in range(EXPERTS)]
    wanted = balance(rows, num_groups, redundant)
    found = renumbered(wanted, held, num_groups)
    assert imbalance(rows, found, num_groups) == pytest.approx(imbalance(rows, wanted, num_groups))

    def num_kept(owners: Any) -> int:
        return sum(len(set(wants) & set(has)) for wants, has in zip(owners, held, strict=True))

    shuffled = list(range(num_groups))
    chance.shuffle(shuffled)
    assert renumbered(tuple(tuple(sorted(shuffled[g] for g in groups)) for groups in held), held, num_groups) == held
    assert num_kept(found) * num_groups >= sum(len(groups) for groups in wanted) // num_groups  # no worse than by chance


def extra_bytes(before: ExpertPlacement, after: ExpertPlacement) -> list[int]:
    """What each group reads, in bytes of fp32."""
    read = [0] * before.num_groups
    for has, wants in zip(before.groups, after.groups, strict=True):
        for old, new in zip(has, wants, strict=True):
            for group in set(new) - set(old):
                read[group] += 3 * 8 * 10 * 4
    return read


@pytest.mark.parametrize("bound", [0, 2 * 3 * 8 * 10 * 4, 10**9])
def test_steps_stay_within_their_memory_or_move_one_layer(bound: int) -> None:
    target = ExpertPlacement.balanced(CONFIG, {n: SKEWED[n:] + SKEWED[:n] for n in (0, 2, 3)}, 2, num_redundant=2)
    steps = [SPREAD, *stages(CONFIG, SPREAD, target, 4, 1, bound)]
    assert steps[-1] == target
    for before, after in itertools.pairwise(steps):
        changed = sum(a != b for a, b in zip(before.groups, after.groups, strict=True))
        assert changed >= 1
        assert changed == 1 or max(extra_bytes(before, after)) <= bound
    assert len(steps) == 2 if bound == 10**9 else len(steps) > 2


def test_no_step_leads_to_where_one_is() -> None:
    assert list(stages(CONFIG, SPREAD, SPREAD, 4, 1, 0)) == []


def test_rows_since_count_a_restarted_worker_whole() -> None:
    assert since({0: [10, 7], 2: [5, 5]}, {0: [4, 9]}) == {0: [6, 7], 2: [5, 5]}
