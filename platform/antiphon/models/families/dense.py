"""What the dense Llama-like families share: reading the common fields, and refusing what would change results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import Activation, AttentionConfig, DecoderConfig, FFNConfig, LayerConfig, rope_config

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def activation(raw: Mapping[str, Any], key: str = "hidden_act") -> Activation:
    """The FFN's activation.

    Raises:
        UnsupportedModel: it is another one.
    """
    name = str(raw.get(key, "silu"))
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r} is not supported", key)
    return _ACTIVATIONS[name]


def refuse(raw: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse fields that are present with another value than the one our computation has.

    Raises:
        UnsupportedModel: names the first such field.
    """
    for key, value in expected.items():
        if key in raw and raw[key] is not None and raw[key] != value:
            raise UnsupportedModel(f"{key} = {raw[key]!r} is not supported (only {value!r})", key)


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids, which configs give as one id, several or none."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(token_id) for token_id in eos) if isinstance(eos, list) else (int(eos),)


def describe_dense(
    raw: Mapping[str, Any], family: str, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
) -> DecoderConfig:
    """A pre-norm decoder with grouped-query attention and a gated FFN."""
    num_heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads)
    max_position = int(raw["max_position_embeddings"])
    refuse(raw, {"pretraining_tp": 1, "use_sliding_window": False})
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        rope=rope_config(raw, head_dim, max_position),
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )
    ffn = FFNConfig(
        intermediate_size=int(raw["intermediate_size"]), activation=activation(raw), bias=bool(raw.get("mlp_bias", False))
    )
    layer = LayerConfig(attention=attention, ffn=ffn)
    return DecoderConfig(
        family=family,
        hidden_size=int(raw["hidden_size"]),
        vocab_size=int(raw["vocab_size"]),
        max_position=max_position,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        layers=(layer,) * int(raw["num_hidden_layers"]),
        eos_token_ids=eos_ids(raw),
    )
