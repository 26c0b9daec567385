"""Qwen3, dense (arXiv 2505.09388): RMSNorm per head on q and k (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import decoder, dense_ffn, dense_layers, grouped_attention
from antiphon.models.families.qwen2 import refuse_windows

ARCHITECTURES = ("Qwen3ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse_windows(raw)
    bias = bool(raw.get("attention_bias", False))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias, qk_norm="head")
    return decoder(raw, "qwen3", dense_layers(raw, attention, dense_ffn(raw)))
