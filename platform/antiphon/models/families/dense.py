"""Parts that families share: grouped-query attention, the dense FFN, and a decoder around its layers (control speed)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import AttentionConfig, DecoderConfig, FFNConfig, LayerConfig, LayerNames, NormPlace
from antiphon.models.families.fields import activation, eos_ids, refuse
from antiphon.models.layers.rope_config import RopeConfig, rope_config

PREFIX = "model.layers.{i}."


def grouped_attention(
    raw: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["none", "head", "whole"] = "none",
    default_theta: float = 10_000.0,
    rope: RopeConfig | None = None,
) -> AttentionConfig:
    """Grouped-query attention with the usual field names; ``rope`` where the rotation is not the usual fields'."""
    num_heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        rope=rope_config(raw, head_dim, int(raw["max_position_embeddings"]), default_theta=default_theta) if rope is None else rope,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )


def dense_ffn(raw: Mapping[str, Any], *, bias: bool = False) -> FFNConfig:
    """The gated FFN with the usual field names."""
    return FFNConfig(intermediate_size=int(raw["intermediate_size"]), activation=activation(raw), bias=bias)


def layer_windows(raw: Mapping[str, Any], is_sliding: Sequence[bool]) -> tuple[int | None, ...]:
    """Each layer's window in tokens (None = it sees all), from ``layer_types`` or, where there are none, ``is_sliding``.

    Raises:
        UnsupportedModel: a layer is of a third kind.
    """
    num_layers, window, kinds = int(raw["num_hidden_layers"]), raw.get("sliding_window"), raw.get("layer_types")
    if kinds is not None:
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise UnsupportedModel(f"layers of type {kind!r} are not supported", "layer_types")
        is_sliding = [kind == "sliding_attention" for kind in kinds]
    if len(is_sliding) != num_layers:
        raise UnsupportedModel(f"{len(is_sliding)} layer types for {num_layers} layers", "layer_types")
    return tuple(int(window) if sliding and window else None for sliding in is_sliding)


def decoder(raw: Mapping[str, Any], family: str, layers: Iterable[LayerConfig], **options: Any) -> DecoderConfig:
    """A decoder with the usual field names; layers without a prefix get the usual one. ``options`` are DecoderConfig's."""
    refuse(raw, {"pretraining_tp": 1})
    placed = tuple(layer if layer.prefix else replace(layer, prefix=PREFIX.format(i=i)) for i, layer in enumerate(layers))
    settings: dict[str, Any] = {
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "max_position": int(raw["max_position_embeddings"]) if "max_position" not in options else None,
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        **options,
    }
    return DecoderConfig(
        family=family,
        hidden_size=int(raw["hidden_size"]),
        vocab_size=int(raw["vocab_size"]),
        layers=placed,
        eos_token_ids=eos_ids(raw),
        **settings,
    )


def dense_layers(
    raw: Mapping[str, Any],
    attention: AttentionConfig,
    ffn: FFNConfig,
    *,
    norms: frozenset[NormPlace] = frozenset(("input", "ffn")),
    names: LayerNames | None = None,
) -> list[LayerConfig]:
    """Equal layers."""
    layer = LayerConfig(attention=attention, ffn=ffn, norms=norms, names=LayerNames() if names is None else names)
    return [layer] * int(raw["num_hidden_layers"])
