"""Gemma 2 (arXiv 2408.00118): bounded scores and logits, four norms a layer, every other layer behind a window (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, FFNConfig, LayerConfig, LayerNames
from antiphon.models.families.dense import decoder, grouped_attention, layer_windows
from antiphon.models.families.fields import activation, optional_number, refuse

ARCHITECTURES = ("Gemma2ForCausalLM",)

_NAMES = LayerNames(ffn_norm="pre_feedforward_layernorm")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"attention_bias": False, "use_bidirectional_attention": False})
    _ = raw.get("hidden_act")  # older configs say it beside hidden_activation, which counts
    windows = layer_windows(raw, [i % 2 == 0 for i in range(int(raw["num_hidden_layers"]))])
    attention = replace(
        grouped_attention(raw),
        scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
        softcap=optional_number(raw, "attn_logit_softcapping"),
    )
    ffn = FFNConfig(intermediate_size=int(raw["intermediate_size"]), activation=activation(raw, "hidden_activation"))
    layers = [
        LayerConfig(
            attention=replace(attention, sliding_window=window),
            ffn=ffn,
            norms=frozenset(("input", "attention_out", "ffn", "ffn_out")),
            names=_NAMES,
        )
        for window in windows
    ]
    return decoder(
        raw,
        "gemma2",
        layers,
        norm="rms_plus_one",
        embed_scale=float(raw["hidden_size"]) ** 0.5,
        logit_softcap=optional_number(raw, "final_logit_softcapping"),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
    )
