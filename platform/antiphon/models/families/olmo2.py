"""OLMo 2 (arXiv 2501.00656): norms behind attention and FFN instead of before, and over all of q and of k (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig, NormPlace
from antiphon.models.families.dense import decoder, dense_ffn, dense_layers, grouped_attention

ARCHITECTURES = ("Olmo2ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    bias = bool(raw.get("attention_bias", False))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias, qk_norm="whole")
    norms: frozenset[NormPlace] = frozenset(("attention_out", "ffn_out"))
    return decoder(raw, "olmo2", dense_layers(raw, attention, dense_ffn(raw), norms=norms))
