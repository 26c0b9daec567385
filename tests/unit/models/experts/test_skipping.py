"""Skipping: bounds, files, and a search on a loss whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from antiphon.core.errors import InvalidInput
from antiphon.models.experts.skipping import ExpertSkipping, search
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
HARM = {0: 0.2, 2: 0.8}  # nats per token when the layer keeps only its best expert


def measure(skipping: ExpertSkipping | None) -> tuple[float, float]:
    """A loss that rises in proportion to each layer's bound."""
    if skipping is None:
        return 2.0, 0.0
    bounds = {n: min(1.0, skipping.bound(n)) for n in HARM}
    return 2.0 + sum(HARM[n] * bounds[n] for n in HARM), sum(bounds.values()) / 2


def test_the_search_finds_the_largest_threshold_within_the_allowed_loss() -> None:
    found = search(describe(MODEL), measure, allowed_rise=0.1, num_halvings=20)
    assert found.importance == pytest.approx({0: 0.25, 2: 1.0})
    # Rise = 0.2 * threshold / 0.25 + 0.8 * threshold.
    assert found.threshold == pytest.approx(0.1 / 1.6, abs=1e-5)
    assert found.loss_rise <= 0.1
    assert found.skipped_share == pytest.approx((found.threshold / 0.25 + found.threshold) / 2)


def test_nothing_allowed_skips_nothing_that_matters() -> None:
    assert search(describe(MODEL), measure, allowed_rise=0.0).threshold == 0.0


def test_thresholds_survive_their_file_and_are_bound_to_their_model(tmp_path: Path) -> None:
    config, path = describe(MODEL), tmp_path / "skip.json"
    found = search(config, measure, allowed_rise=0.1)
    found.save(path, config)
    assert ExpertSkipping.load(path, config) == found
    with pytest.raises(InvalidInput, match="made for"):
        ExpertSkipping.load(path, describe({**MODEL, "num_hidden_layers": 4}))
    path.write_text("[]")
    with pytest.raises(InvalidInput, match="not a thresholds file"):
        ExpertSkipping.load(path, config)


def test_a_model_without_choices_can_t_be_searched() -> None:
    with pytest.raises(InvalidInput, match="none can be skipped"):
        search(describe({**MODEL, "num_experts_per_tok": 1}), measure, allowed_rise=0.1)
