"""gpt-oss (arXiv 2508.10925): sinks, alternating windows, experts with biases and a bounded activation (control speed).

The published checkpoints have the experts in MXFP4; those that transformers writes have them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, LayerConfig, LayerNames, MoEConfig
from antiphon.models.families.dense import decoder, grouped_attention, layer_windows
from antiphon.models.families.fields import refuse
from antiphon.models.families.sparse import num_experts
from antiphon.models.layers.rope_config import rope_settings

ARCHITECTURES = ("GptOssForCausalLM",)

_NAMES = LayerNames(router="mlp.router.weight", fused_experts="mlp.experts.")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"hidden_act": "silu", "swiglu_alpha": 1.702})
    top_k, scaling = int(raw["num_experts_per_tok"]), rope_settings(raw)
    # Said a second time in the published configs.
    refuse(raw, {"experts_per_token": top_k, "initial_context_length": scaling.get("original_max_position_embeddings")})
    bias = bool(raw.get("attention_bias", True))
    attention = replace(grouped_attention(raw, qkv_bias=bias, output_bias=bias, default_theta=150_000.0), has_sinks=True)
    gate = GateConfig(
        num_experts=num_experts(raw), top_k=top_k, has_logit_bias=True, renormalise=True
    )  # a softmax over the chosen is one over all, renormalised
    moe = MoEConfig(
        gate=gate,
        intermediate_size=int(raw["intermediate_size"]),
        activation="gpt_oss",
        bias=True,
        limit=float(raw.get("swiglu_limit", 7.0)),
    )
    windows = layer_windows(raw, [i % 2 == 0 for i in range(int(raw["num_hidden_layers"]))])
    layers = [LayerConfig(attention=replace(attention, sliding_window=window), ffn=moe, names=_NAMES) for window in windows]
    return decoder(raw, "gpt_oss", layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))
