"""The published spelling of a Step-3.7 config means what transformers makes of it, and layers for later tokens are left out."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe

KINDS = ["full_attention", "sliding_attention", "full_attention"]
PUBLISHED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 2,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 36,
    "share_expert_dim": 28,
    "moe_layers_enum": "1,2",
    "moe_router_scaling_factor": 1.7,
    "sliding_window": 20,
    "layer_types": [*KINDS, "sliding_attention", "full_attention"],
    "rope_theta": [5000.0, 100.0, 5000.0, 100.0, 5000.0],
    "partial_rotary_factors": [0.5, 1.0, 0.5, 1.0, 0.5],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
        "original_max_position_embeddings": 64,
    },
    "yarn_only_types": ["full_attention"],
    "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2},
    "swiglu_limits": [0.0, 0.0, 0.3, 0.0, 0.0],
    "swiglu_limits_shared": [0.2, 0.0, 0.1, 0.0, 0.0],
}


def test_both_spellings_describe_one_model() -> None:
    written = hf.Step3p7Config(text_config={**PUBLISHED}).to_dict()
    assert "num_sliding_attention_heads" in written["text_config"]  # transformers has its own words
    ours = describe({**written, "architectures": ["Step3p7ForConditionalGeneration"]})
    assert describe({**PUBLISHED, "architectures": ["Step3p5ForCausalLM"]}) == ours
    assert [layer.attention.num_heads for layer in ours.layers] == [4, 6, 4]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 1}}, "attention_other_setting"),
        ({"layer_types": KINDS * 2}, "layer_types"),
        ({"yarn_only_types": ["sliding_attention"]}, "yarn_only_types"),
        ({"use_moe_router_bias": False}, "use_moe_router_bias"),
        ({"per_layer_config": {"0": {"num_attention_heads": 6}}}, "per_layer_config"),
        ({"num_experts_per_tok": 4}, "moe_top_k"),
    ],
)
def test_what_can_t_be_expressed_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        describe({**PUBLISHED, **change, "architectures": ["Step3p5ForCausalLM"]})
    assert caught.value.field == field
