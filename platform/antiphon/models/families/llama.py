"""Llama 2 / 3 and SmolLM2 (arXiv 2307.09288, 2407.21783, 2502.02737)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import describe_dense

ARCHITECTURES = ("LlamaForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    bias = bool(raw.get("attention_bias", False))
    return describe_dense(raw, "llama", qkv_bias=bias, output_bias=bias)
