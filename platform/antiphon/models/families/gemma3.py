"""Gemma 3, text (arXiv 2503.19786): four norms a layer, scaled embeddings, windows, a rope base for each kind (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, FFNConfig, LayerConfig, LayerNames
from antiphon.models.families.dense import decoder, grouped_attention, layer_windows
from antiphon.models.families.fields import activation, refuse
from antiphon.models.layers.rope_config import RopeConfig, rope_config, rope_settings

ARCHITECTURES = ("Gemma3ForCausalLM",)

_NAMES = LayerNames(ffn_norm="pre_feedforward_layernorm")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"attention_bias": False, "attn_logit_softcapping": None, "use_bidirectional_attention": False})
    pattern, older_pattern = raw.get("sliding_window_pattern"), raw.get("_sliding_window_pattern")
    period = int(pattern or older_pattern or 6)
    windows = layer_windows(raw, [(i + 1) % period != 0 for i in range(int(raw["num_hidden_layers"]))])
    near, far = _ropes(raw)
    attention = replace(grouped_attention(raw, qk_norm="head", rope=far), scale=float(raw["query_pre_attn_scalar"]) ** -0.5)
    ffn = FFNConfig(intermediate_size=int(raw["intermediate_size"]), activation=activation(raw, "hidden_activation"))
    layers = [
        LayerConfig(
            attention=attention if window is None else replace(attention, rope=near, sliding_window=window),
            ffn=ffn,
            norms=frozenset(("input", "attention_out", "ffn", "ffn_out")),
            names=_NAMES,
        )
        for window in windows
    ]
    cap = raw.get("final_logit_softcapping")
    return decoder(
        raw,
        "gemma3",
        layers,
        norm="rms_plus_one",
        embed_scale=float(raw["hidden_size"]) ** 0.5,
        logit_softcap=None if cap is None else float(cap),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
    )


def _ropes(raw: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of sliding layers and of full ones; older configs have flat fields for them, newer ones a section for each kind."""
    head_dim, max_position = int(raw["head_dim"]), int(raw["max_position_embeddings"])
    sections = raw.get("rope_parameters") or {}
    for kind in sections:
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModel(f"rope_parameters of {kind!r} layers are not supported", f"rope_parameters.{kind}")
    flat_local, flat_full, flat_scaling = raw.get("rope_local_base_freq"), raw.get("rope_theta"), raw.get("rope_scaling")
    # A flat field gives what the section leaves open, and scaling for full layers is often added to a config that has sections.
    local = {"rope_theta": flat_local or 10_000.0, **(sections.get("sliding_attention") or {})}
    full = {
        "rope_theta": flat_full or 1_000_000.0,
        **rope_settings({"rope_parameters": sections.get("full_attention"), "rope_scaling": flat_scaling}),
    }
    return (
        rope_config({}, head_dim, max_position, default_theta=10_000.0, scaling=local),
        rope_config({}, head_dim, max_position, default_theta=1_000_000.0, scaling=full),
    )
