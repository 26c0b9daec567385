"""dots.llm1 (arXiv 2506.05767): Qwen3's attention with DeepSeek-V3's gate and shared experts (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.families.deepseek import sigmoid_gate
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention, layer_windows
from antiphon.models.families.fields import activation
from antiphon.models.families.sparse import DEEPSEEK_NAMES, first_dense_layers, mixed_layers

ARCHITECTURES = ("Dots1ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    bias = bool(raw.get("attention_bias", False))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias, qk_norm="head")
    moe = MoEConfig(
        gate=sigmoid_gate(raw),
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["moe_intermediate_size"]) * int(raw.get("n_shared_experts") or 0),
    )
    num_layers, full = int(raw["num_hidden_layers"]), raw.get("max_window_layers")
    windows = layer_windows(raw, [i >= (num_layers if full is None else int(full)) for i in range(num_layers)])
    layers = mixed_layers(first_dense_layers(raw), attention, dense_ffn(raw), moe, names=DEEPSEEK_NAMES, windows=windows)
    return decoder(raw, "dots1", layers)
