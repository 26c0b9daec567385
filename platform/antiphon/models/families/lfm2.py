"""LFM2 (arXiv 2511.23404): gated short convolutions, and a layer of attention to every two or three of them (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, FFNConfig, LayerConfig, LayerNames, ShortConvConfig, TensorNames
from antiphon.models.families.dense import decoder, grouped_attention
from antiphon.models.families.fields import refuse

ARCHITECTURES = ("Lfm2ForCausalLM",)

_COMMON = LayerNames(input_norm="operator_norm", ffn_norm="ffn_norm", ffn="feed_forward.", gate="w1", up="w3", down="w2")
_ATTENTION = replace(_COMMON, attention_out="out_proj", q_norm="q_layernorm", k_norm="k_layernorm")
_CONV = replace(_COMMON, attention="conv.")
_TRAINING = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    width = int(raw["hidden_size"])
    for name in _TRAINING:
        _ = raw.get(name)
    norm_eps = float(raw.get("norm_eps", 1e-5))
    refuse(raw, {"block_use_swiglu": True, "use_pos_enc": True, "num_heads": raw["num_attention_heads"]})
    refuse(raw, {"block_dim": width, "conv_dim": width, "conv_dim_out": width, "block_norm_eps": norm_eps})
    attention = grouped_attention(raw, qk_norm="head", default_theta=1_000_000.0)
    conv = ShortConvConfig(width=width, kernel_size=int(raw.get("conv_L_cache", 3)), bias=bool(raw.get("conv_bias", False)))
    ffn = FFNConfig(intermediate_size=_ffn_width(raw))
    layers = [
        LayerConfig(attention=attention, ffn=ffn, names=_ATTENTION)
        if attends
        else LayerConfig(attention=conv, ffn=ffn, names=_CONV)
        for attends in _attention_layers(raw)
    ]
    tied, older_tied = raw.get("tie_word_embeddings"), raw.get("tie_embedding")
    return decoder(
        raw,
        "lfm2",
        layers,
        norm_eps=norm_eps,
        tie_embeddings=bool(older_tied if older_tied is not None else tied if tied is not None else True),
        names=TensorNames(final_norm="model.embedding_norm"),
    )


def _ffn_width(raw: Mapping[str, Any]) -> int:
    """Two thirds of what the config says, times a factor, up to a multiple: as Llama's first configs did."""
    wide, older = raw.get("intermediate_size"), raw.get("block_ff_dim")
    width = int(older or wide or 12288)
    multiple, factor = int(raw.get("block_multiple_of", 256)), raw.get("block_ffn_dim_multiplier", 1.0)
    if not raw.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    return width if factor is None else multiple * -(-int(float(factor) * width) // multiple)


def _attention_layers(raw: Mapping[str, Any]) -> list[bool]:
    num_layers, kinds, indices = int(raw["num_hidden_layers"]), raw.get("layer_types"), raw.get("full_attn_idxs")
    if kinds is None:
        return [indices is None or i in indices for i in range(num_layers)]
    for kind in kinds:
        if kind not in ("conv", "full_attention"):
            raise UnsupportedModel(f"layers of type {kind!r} are not supported", "layer_types")
    if len(kinds) != num_layers:
        raise UnsupportedModel(f"{len(kinds)} layer types for {num_layers} layers", "layer_types")
    return [kind == "full_attention" for kind in kinds]
