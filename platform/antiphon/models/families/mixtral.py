"""Mixtral (arXiv 2401.04088): two of eight experts, weighted by a softmax over the chosen (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, grouped_attention
from antiphon.models.families.fields import activation
from antiphon.models.families.sparse import MIXTRAL_NAMES, mixed_layers, num_experts

ARCHITECTURES = ("MixtralForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    _ = raw.get("router_jitter_noise")  # while training only
    window = raw.get("sliding_window")
    attention = replace(grouped_attention(raw, default_theta=1e6), sliding_window=int(window) if window else None)
    gate = GateConfig(num_experts=num_experts(raw), top_k=int(raw["num_experts_per_tok"]), renormalise=True)
    moe = MoEConfig(gate=gate, intermediate_size=int(raw["intermediate_size"]), activation=activation(raw))
    layers = mixed_layers([True] * int(raw["num_hidden_layers"]), attention, None, moe, names=MIXTRAL_NAMES)
    return decoder(raw, "mixtral", layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))
