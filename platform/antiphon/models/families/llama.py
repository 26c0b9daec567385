"""Llama 2 / 3 and SmolLM2 (arXiv 2307.09288, 2407.21783, 2502.02737) (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import decoder, dense_ffn, dense_layers, grouped_attention

ARCHITECTURES = ("LlamaForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    bias = bool(raw.get("attention_bias", False))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias)
    return decoder(raw, "llama", dense_layers(raw, attention, dense_ffn(raw, bias=bool(raw.get("mlp_bias", False)))))
