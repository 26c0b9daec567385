"""Gates against independent computations: loops over plain numbers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from antiphon.models.config import GateConfig
from antiphon.models.experts.gates import choose


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-x)) for x in logits]


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def logits(num_rows: int, num_choices: int) -> list[list[float]]:
    chance = random.Random(num_rows * 1000 + num_choices)
    return [[chance.gauss(0, 1.5) for _ in range(num_choices)] for _ in range(num_rows)]


def check(gate: GateConfig, rows: list[list[float]], expected: list[dict[int, float]], **learned: Any) -> None:
    ids, weights = choose(gate, torch.tensor(rows), **learned)
    assert ids.shape == weights.shape == (len(rows), gate.top_k)
    for t, want in enumerate(expected):
        got = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        assert got.keys() == want.keys()
        assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (5, 5), (1, 1), (32, 4)])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_top_k_takes_the_best_scores(num_experts: int, top_k: int, renormalise: bool, scoring: Any) -> None:
    rows = logits(9, num_experts)
    expected = []
    for row in rows:
        scores = softmax(row) if scoring == "softmax" else sigmoid(row)
        chosen = best(scores, top_k)
        total = sum(scores[e] for e in chosen) if renormalise else 1.0
        expected.append({e: 1.5 * scores[e] / total for e in chosen})
    check(GateConfig(num_experts=num_experts, top_k=top_k, renormalise=renormalise, scoring=scoring, scale=1.5), rows, expected)


def test_a_correction_bias_moves_the_choice_and_not_the_weights() -> None:
    rows, bias = logits(7, 6), [0.0, 0.9, -0.9, 0.0, 0.3, 0.0]
    expected = []
    for row in rows:
        scores = sigmoid(row)
        expected.append({e: scores[e] for e in best([s + b for s, b in zip(scores, bias, strict=True)], 2)})
    gate = GateConfig(num_experts=6, top_k=2, scoring="sigmoid", has_correction_bias=True)
    check(gate, rows, expected, correction_bias_E=torch.tensor(bias))


@pytest.mark.parametrize("counted", [1, 2])
def test_group_limited_leaves_out_all_but_the_best_groups(counted: int) -> None:
    rows = logits(20, 12)
    expected = []
    for row in rows:
        scores = softmax(row)
        groups = [scores[3 * g : 3 * g + 3] for g in range(4)]
        kept = best([sum(sorted(group)[-counted:]) for group in groups], 2)
        inside = [s if i // 3 in kept else -1.0 for i, s in enumerate(scores)]
        expected.append({e: scores[e] for e in best(inside, 4)})
    gate = GateConfig(
        num_experts=12,
        top_k=4,
        choice="group_limited",
        num_groups=4,
        num_kept_groups=2,
        group_score="max" if counted == 1 else "top2_sum",
    )
    check(gate, rows, expected)


def test_grouped_takes_as_many_from_every_group_with_a_factor_per_expert() -> None:
    rows, factors = logits(20, 12), [0.5 + 0.1 * e for e in range(12)]
    expected = []
    for row in rows:
        scores = softmax(row)
        chosen = [4 * g + i for g in range(3) for i in best(scores[4 * g : 4 * g + 4], 2)]
        expected.append({e: scores[e] * factors[e] for e in chosen})
    gate = GateConfig(num_experts=12, top_k=6, choice="one_per_group_slot", num_groups=3, has_expert_scale=True)
    check(gate, rows, expected, expert_scale_E=torch.tensor(factors))


def test_null_experts_take_a_place_and_no_weight() -> None:
    rows = logits(30, 10)
    expected = []
    for row in rows:
        scores = softmax(row)
        chosen = best(scores, 4)
        total = sum(scores[e] for e in chosen if e < 6)
        expected.append({e: scores[e] / total if e < 6 else 0.0 for e in chosen})
    check(GateConfig(num_experts=6, top_k=4, num_null=4, renormalise=True), rows, expected)


def test_a_row_of_null_experts_only_has_no_weight_at_all() -> None:
    _, weights = choose(GateConfig(num_experts=2, top_k=2, num_null=2, renormalise=True), torch.tensor([[-9.0, -9.0, 9.0, 9.0]]))
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_sparse_mixer_takes_two_in_turn_weighted_among_those_nearby(jitter: float) -> None:
    rows = logits(40, 6)
    expected = []
    for row in rows:
        left = dict(enumerate(row))
        weights = {}
        for _ in range(2):
            top = max(left.values())
            near = {e: x for e, x in left.items() if (top - x) / max(abs(x), top) <= 2 * jitter}
            e = max(left, key=lambda i: left[i])
            weights[e] = math.exp(left.pop(e)) / sum(math.exp(x) for x in near.values())
        expected.append(weights)
    check(GateConfig(num_experts=6, top_k=2, choice="sparse_mixer", mixer_jitter=jitter), rows, expected)


def test_ties_give_distinct_experts_and_the_same_ones_each_time() -> None:
    gate = GateConfig(num_experts=8, top_k=3)
    first, weights = choose(gate, torch.zeros(4, 8))
    again, _ = choose(gate, torch.zeros(1, 8))
    assert all(len(set(row)) == 3 for row in first.tolist())
    assert first.tolist() == again.tolist() * 4
    assert weights.flatten().tolist() == pytest.approx([1 / 8] * 12)


def test_not_a_number_shows_in_the_weights() -> None:
    for choice in ("top_k", "sparse_mixer"):
        _, weights = choose(GateConfig(num_experts=4, top_k=2, choice=choice), torch.tensor([[0.0, float("nan"), 1.0, 2.0]]))
        assert not torch.isfinite(weights.sum())
