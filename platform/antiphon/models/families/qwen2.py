"""Qwen2 and Qwen2.5, dense (arXiv 2407.10671): biases on q, k and v (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig
from antiphon.models.families.dense import decoder, dense_ffn, dense_layers, grouped_attention
from antiphon.models.families.fields import refuse

ARCHITECTURES = ("Qwen2ForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse_windows(raw)
    return decoder(raw, "qwen2", dense_layers(raw, grouped_attention(raw, qkv_bias=True), dense_ffn(raw)))


def refuse_windows(raw: Mapping[str, Any]) -> None:
    """Qwen's sliding windows are off in every released model; the fields beside the switch then mean nothing.

    Raises:
        UnsupportedModel: they are on.
    """
    refuse(raw, {"use_sliding_window": False})
    for kind in raw.get("layer_types") or ():
        refuse({"layer_types": kind}, {"layer_types": "full_attention"})
    _ = raw.get("sliding_window"), raw.get("max_window_layers")
