"""Rotary settings that a config gives in two spellings, against transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe
from antiphon.models.layers.rope_config import rope_config

HEAD_DIM = 128
MAX_POSITION = 131_072
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 1_000_000.0}


def by_transformers(raw: dict[str, Any]) -> tuple[list[float], float]:
    config = hf.LlamaConfig(
        head_dim=HEAD_DIM, max_position_embeddings=MAX_POSITION, **copy.deepcopy(raw)
    )  # it writes into what it is given
    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.tolist(), factor


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 1_000_000.0, "rope_parameters": PLAIN, "rope_scaling": YARN},
        {"rope_theta": 1_000_000.0, "rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_theta": 1_000_000.0, "rope_parameters": {}, "rope_scaling": YARN},
        {"rope_theta": 500_000.0, "rope_parameters": {**YARN, "rope_theta": 500_000.0}, "rope_scaling": YARN},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}, "rope_scaling": None},
        {"rope_theta": 10_000.0, "rope_scaling": {**{k: v for k, v in YARN.items() if k != "rope_type"}, "type": "yarn"}},
    ],
)
def test_what_either_spelling_says_counts(raw: dict[str, Any]) -> None:
    frequencies, factor = by_transformers(raw)
    found = rope_config(raw, HEAD_DIM, MAX_POSITION)
    assert found.inv_freq == pytest.approx(frequencies, rel=1e-6)
    assert found.attention_factor == pytest.approx(factor, rel=1e-6)


def test_yarn_beside_a_default_section_scales() -> None:
    raw = {"rope_theta": 1_000_000.0, "rope_parameters": PLAIN, "rope_scaling": YARN}
    found = rope_config(raw, HEAD_DIM, MAX_POSITION)
    assert found.attention_factor == pytest.approx(1.138629, abs=1e-6)  # 0.1 ln 4 + 1, arXiv 2309.00071
    assert found.inv_freq[40] == pytest.approx(4.4457e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 8.0}}, "rope_scaling.factor"),
        ({"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_two_spellings_that_contradict_each_other_are_refused_by_name(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        rope_config(raw, HEAD_DIM, MAX_POSITION)
    assert caught.value.field == field


def test_scaling_beside_sections_reaches_gemma_3s_full_layers() -> None:
    sections = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    raw = hf.Gemma3TextConfig(num_hidden_layers=6, head_dim=64).to_dict()
    raw |= {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_parameters": sections,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    raw["use_bidirectional_attention"] = False
    near, far = describe(raw).layers[0].attention, describe(raw).layers[5].attention
    assert near.rope.inv_freq[1] == pytest.approx(10_000.0 ** (-2 / 64))
    assert far.rope.inv_freq[0] == pytest.approx(1 / 8)


def test_latent_attentions_scale_follows_scaling_in_either_spelling() -> None:
    raw = hf.DeepseekV3Config(num_hidden_layers=2).to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    yarn = {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
    for one, other in ((yarn, None), (PLAIN | {"rope_theta": 10_000.0}, yarn)):
        config = describe({**raw, "rope_parameters": one, "rope_scaling": other, "rope_theta": 10_000.0})
        assert config.layers[0].attention.scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541 + 1) ** 2)


def test_two_names_for_the_number_of_experts_must_agree() -> None:
    raw = hf.MixtralConfig(num_hidden_layers=2).to_dict() | {"architectures": ["MixtralForCausalLM"]}
    with pytest.raises(UnsupportedModel, match="said twice"):
        describe({**raw, "num_experts": 4, "num_local_experts": 8})
