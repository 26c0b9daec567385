"""Families refuse by name what they can't express."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}


def config(kind: Any, architecture: str, **fields: Any) -> dict[str, Any]:
    return {**kind(**fields).to_dict(), "architectures": [architecture]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({**LLAMA, "residual_scale": 0.5}, "residual_scale"),
    "quantised weights": ({**LLAMA, "quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method"),
    "an unknown activation": ({**LLAMA, "hidden_act": "relu"}, "hidden_act"),
    "an unknown rope": ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
    "an unknown rope parameter": ({**LLAMA, "rope_scaling": {"rope_type": "linear", "bend": 2.0}}, "rope_scaling.bend"),
    "a missing field": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size"),
    "an unknown family": ({"architectures": ["NoSuchForCausalLM"]}, "architectures"),
    "sliding windows of Qwen": (config(hf.Qwen2Config, "Qwen2ForCausalLM", use_sliding_window=True), "use_sliding_window"),
    "capped attention scores": (
        config(hf.Gemma3TextConfig, "Gemma3ForCausalLM", attn_logit_softcapping=50.0),
        "attn_logit_softcapping",
    ),
    "bidirectional Gemma": (
        config(hf.Gemma3TextConfig, "Gemma3ForCausalLM", use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "a DeepSeek-V2 gate of another kind": (
        config(hf.DeepseekV2Config, "DeepseekV2ForCausalLM", topk_method="other"),
        "topk_method",
    ),
    "SparseMixer with three experts": (
        config(hf.PhimoeConfig, "PhimoeForCausalLM", num_experts_per_tok=3),
        "num_experts_per_tok",
    ),
    "an unknown layer type": (
        {**config(hf.Dots1Config, "Dots1ForCausalLM", n_routed_experts=8, num_experts_per_tok=2), "layer_types": ["linear"] * 62},
        "layer_types",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_field_that_can_t_be_expressed_is_refused_by_its_name(what: str) -> None:
    raw, field = REFUSED[what]
    with pytest.raises(UnsupportedModel) as caught:
        describe(raw)
    assert caught.value.field == field


def test_bookkeeping_fields_are_taken() -> None:
    extra = {"transformers_version": "9", "use_cache": True, "initializer_range": 0.1, "_name_or_path": "x", "mystery": None}
    assert describe({**LLAMA, **extra}) == describe(LLAMA)


def test_fingerprints_differ_where_results_do() -> None:
    assert describe(LLAMA).fingerprint == describe(dict(LLAMA)).fingerprint
    assert describe({**LLAMA, "rms_norm_eps": 1e-5}).fingerprint != describe(LLAMA).fingerprint
