"""Qwen3, dense (arXiv 2505.09388): RMSNorm per head on q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import describe_dense

ARCHITECTURES = ("Qwen3ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    bias = bool(raw.get("attention_bias", False))
    return describe_dense(raw, "qwen3", qkv_bias=bias, output_bias=bias, qk_norm=True)
