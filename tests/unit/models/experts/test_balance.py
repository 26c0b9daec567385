"""Placements: even, complete, saved and loaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import InvalidInput
from antiphon.models.experts.balance import balance, imbalance
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.families import describe

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
    "mlp_only_layers": [1],
}


def zipf(count: int, exponent: float, seed: int) -> list[float]:
    rows = [1000.0 / (rank + 1) ** exponent for rank in range(count)]
    random.Random(seed).shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_groups", [2, 4])
def test_redundant_copies_even_out_a_zipf_load(seed: int, num_groups: int) -> None:
    rows = sorted(zipf(32, 1.2, seed), reverse=True)
    contiguous = tuple((e * num_groups // 32,) for e in range(32))
    assert imbalance(rows, contiguous, num_groups) > 1.5
    random.Random(seed).shuffle(rows)
    assert imbalance(rows, balance(rows, num_groups, num_redundant=num_groups), num_groups) < 1.15


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 20))
def test_every_expert_is_held_and_no_group_twice_nor_beyond_its_room(rows: list[float], num_groups: int, redundant: int) -> None:
    owners = balance(rows, num_groups, redundant)
    assert len(owners) == len(rows)
    held = [0] * num_groups
    for groups in owners:
        assert groups
        assert list(groups) == sorted(set(groups))
        for group in groups:
            held[group] += 1
    assert max(held) <= -(-(len(rows) + redundant) // num_groups)


def test_the_hierarchical_policy_keeps_gate_groups_within_a_node() -> None:
    rows = zipf(32, 1.0, 1)
    owners = balance(rows, 4, 4, num_expert_groups=8, num_nodes=2)
    for group in range(8):
        nodes = {g // 2 for e in range(4 * group, 4 * group + 4) for g in owners[e]}
        assert len(nodes) == 1
    assert imbalance(rows, owners, 4) < imbalance(rows, tuple((e // 8,) for e in range(32)), 4)


def test_groups_must_divide_over_nodes() -> None:
    with pytest.raises(InvalidInput, match="3 groups don't divide over 2 nodes"):
        balance([1.0] * 8, 3, num_nodes=2)


def test_a_placement_survives_its_file(tmp_path: Path) -> None:
    config = describe(MODEL)
    placement = ExpertPlacement.balanced(config, {0: [9, 1, 1, 1, 1, 1]}, 2, num_redundant=2)
    assert placement.groups[0][0] == (0, 1)
    assert placement.groups[1] == ()
    placement.save(tmp_path / "placement.json", config)
    assert ExpertPlacement.load(tmp_path / "placement.json", config) == placement


@pytest.mark.parametrize("text", ["", "{}", '{"format":"other"}', "[1]"])
def test_a_file_that_is_no_placement_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "placement.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"placement\.json"):
        ExpertPlacement.load(tmp_path / "placement.json", describe(MODEL))


def test_a_placement_of_another_model_is_refused(tmp_path: Path) -> None:
    config = describe(MODEL)
    ExpertPlacement.spread(config, 2).save(tmp_path / "placement.json", config)
    with pytest.raises(InvalidInput, match="made for model"):
        ExpertPlacement.load(tmp_path / "placement.json", describe({**MODEL, "num_hidden_layers": 4}))
