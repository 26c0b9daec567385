"""Qwen2 and Qwen2.5, dense (arXiv 2407.10671): biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import describe_dense

ARCHITECTURES = ("Qwen2ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    return describe_dense(raw, "qwen2", qkv_bias=True)
