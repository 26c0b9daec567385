"""Figures that no model has are refused where its config is read, not served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe
from antiphon.testing import write_tiny_llama


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("model")
    write_tiny_llama(path)
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tie_word_embeddings", "false"),
        ("attention_bias", "no"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("rms_norm_eps", NAN),
        ("rms_norm_eps", INF),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", True),
        ("rms_norm_eps", "1e-5"),
        ("head_dim", -12),
        ("head_dim", "12"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("hidden_size", 0),
        ("vocab_size", 0),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("partial_rotary_factor", -1),
        ("partial_rotary_factor", 2),
        ("rope_parameters", {"rope_type": "default", "rope_theta": NAN}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -10000.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "10000"}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": -1}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": NAN}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
    ],
)
def test_what_no_model_has_is_refused(raw: dict[str, Any], name: str, value: object) -> None:
    with pytest.raises(UnsupportedModel):
        describe({**raw, name: value})


TAKEN = [("tie_word_embeddings", 1), ("num_hidden_layers", 2.0), ("head_dim", None), ("rms_norm_eps", 0), ("attention_bias", None)]


@pytest.mark.parametrize(("name", "value"), TAKEN)
def test_what_models_have_is_taken(raw: dict[str, Any], name: str, value: object) -> None:
    assert describe({**raw, name: value}).layers
