"""Qwen3-Next: three layers of gated delta nets to one of gated attention, norms centred on zero, a shared expert (control speed).

Sources: the model card of Qwen3-Next-80B-A3B, arXiv 2412.06464 (gated delta nets), 2505.06708 (gated attention). Layers that
predict a second token ("mtp.") are described in families.prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import (
    AttentionConfig,
    DecoderConfig,
    DeltaConfig,
    FFNConfig,
    GateConfig,
    LayerConfig,
    LayerNames,
    MoEConfig,
)
from antiphon.models.families.dense import decoder, grouped_attention
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import num_experts, qwen_sparse_layers

ARCHITECTURES = ("Qwen3NextForCausalLM",)

_DELTA_NAMES = LayerNames(attention="linear_attn.", attention_out="out_proj")
_ROTATED = 0.25  # of a head, where the config does not say


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"hidden_act": "silu"})
    _ = raw.get("mtp_num_hidden_layers")
    gate = GateConfig(
        num_experts=num_experts(raw), top_k=int(raw["num_experts_per_tok"]), renormalise=bool(raw.get("norm_topk_prob", True))
    )
    moe = MoEConfig(
        gate=gate,
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["shared_expert_intermediate_size"]),
        has_shared_gate=True,
    )
    sparse = qwen_sparse_layers(raw)
    width = raw.get("intermediate_size")
    if not all(sparse) and width is None:
        raise KeyError("intermediate_size")
    ffns = [moe if each else FFNConfig(intermediate_size=int(width or 0), activation=activation(raw)) for each in sparse]
    return hybrid(raw, "qwen3_next", ffns, form="by_key_head")


def hybrid(
    raw: Mapping[str, Any], family: str, ffns: list[MoEConfig | FFNConfig], *, form: Literal["by_key_head", "split"]
) -> DecoderConfig:
    """A decoder of these layers around any FFNs, one a layer."""
    attention, delta = gated_attention(raw), delta_net(raw, form)
    layers = [
        LayerConfig(attention=delta, ffn=ffn, names=_DELTA_NAMES) if is_linear else LayerConfig(attention=attention, ffn=ffn)
        for is_linear, ffn in zip(linear_layers(raw), ffns, strict=True)
    ]
    return decoder(raw, family, layers, norm="rms_plus_one")


def gated_attention(raw: Mapping[str, Any]) -> AttentionConfig:
    """Attention with a norm per head on q and k, a quarter of a head rotated, and a gate on what it gives."""
    bias = bool(raw.get("attention_bias", False))
    if raw.get("partial_rotary_factor") is None and (raw.get("rope_parameters") or {}).get("partial_rotary_factor") is None:
        raw = {**raw, "partial_rotary_factor": _ROTATED}
    return replace(grouped_attention(raw, qkv_bias=bias, output_bias=bias, qk_norm="head"), has_output_gate=True)


def delta_net(raw: Mapping[str, Any], form: Literal["by_key_head", "split"]) -> DeltaConfig:
    """The gated delta net of a layer.

    Raises:
        UnsupportedModel: key heads don't share the value heads evenly.
    """
    num_keys, num_values = int(raw["linear_num_key_heads"]), int(raw["linear_num_value_heads"])
    if num_values % num_keys:
        raise UnsupportedModel(f"{num_values} value heads can't be shared by {num_keys} key heads", "linear_num_value_heads")
    return DeltaConfig(
        num_key_heads=num_keys,
        num_heads=num_values,
        key_dim=int(raw["linear_key_head_dim"]),
        value_dim=int(raw["linear_value_head_dim"]),
        kernel_size=int(raw["linear_conv_kernel_dim"]),
        form=form,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    )


def linear_layers(raw: Mapping[str, Any]) -> list[bool]:
    """Which layers are linear, from ``layer_types`` or, where there are none, every but each fourth.

    Raises:
        UnsupportedModel: a layer is of a third kind.
    """
    num_layers, kinds = int(raw["num_hidden_layers"]), raw.get("layer_types")
    interval = int(raw.get("full_attention_interval") or 4)
    if kinds is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            raise UnsupportedModel(f"layers of type {kind!r} are not supported", "layer_types")
    if len(kinds) != num_layers:
        raise UnsupportedModel(f"{len(kinds)} layer types for {num_layers} layers", "layer_types")
    return [kind == "linear_attention" for kind in kinds]
