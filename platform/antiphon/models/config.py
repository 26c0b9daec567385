"""What a decoder is, in our own words: one description per model, made by its family from a Hugging Face config (pure values).

Every field that changes results is here; a family refuses configs that it can't express. The attention worker and the FFN worker
build their halves from the same description. Must not know: tensors, where weights are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from antiphon.core.errors import UnsupportedModel
from antiphon.core.kv import KVPlane

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: ``inv_freq`` per pair of dimensions (after scaling) and the factor on cos and sin."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float  # on q·k
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False  # RMSNorm per head on q and k, before the rotation (Qwen3)
    sliding_window: int | None = None  # tokens seen, the current one included; None = all

    @property
    def planes(self) -> tuple[KVPlane, ...]:
        """What the layer caches per token."""
        return (
            KVPlane(name="k", num_heads=self.num_kv_heads, head_dim=self.head_dim),
            KVPlane(name="v", num_heads=self.num_kv_heads, head_dim=self.head_dim),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNConfig:
    """A dense gated FFN: down(act(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder layer: its two halves."""

    attention: AttentionConfig
    ffn: FFNConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Checkpoint names; ``{i}`` is the layer. The defaults are those of Llama, which most families share."""

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer: str = "model.layers.{i}."
    input_norm: str = "input_layernorm.weight"
    ffn_norm: str = "post_attention_layernorm.weight"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A whole decoder."""

    family: str
    hidden_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    layers: tuple[LayerConfig, ...]
    names: TensorNames = field(default_factory=TensorNames)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def fingerprint(self) -> str:
        """Short digest over every field; equal for peers that compute the same function."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


def rope_config(raw: Mapping[str, Any], head_dim: int, max_position: int, *, theta_key: str = "rope_theta") -> RopeConfig:
    """Rotary frequencies from a Hugging Face config.

    Types ``default``, ``linear``, ``llama3`` (Llama 3.1 model card's frequency smoothing) and ``yarn`` (arXiv 2309.00071).

    Raises:
        UnsupportedModel: another rope type.
    """
    scaling: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw.get(theta_key) or 10_000.0)
    rotary_dim = int(head_dim * float(scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0))
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    inv_freq = [theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if kind == "default":
        return RopeConfig(inv_freq=tuple(inv_freq))
    if kind == "linear":
        return RopeConfig(inv_freq=tuple(f / float(scaling["factor"]) for f in inv_freq))
    if kind == "llama3":
        return RopeConfig(inv_freq=tuple(_llama3_frequency(f, scaling) for f in inv_freq))
    if kind == "yarn":
        return _yarn(inv_freq, theta, rotary_dim, scaling, max_position)
    raise UnsupportedModel(f"rope type {kind!r} is not supported", "rope_scaling.rope_type")


def _llama3_frequency(frequency: float, scaling: Mapping[str, Any]) -> float:
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2.0 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1.0 - smooth) * frequency / factor + smooth * frequency


def _yarn(inv_freq: list[float], theta: float, rotary_dim: int, scaling: Mapping[str, Any], max_position: int) -> RopeConfig:
    original = float(scaling.get("original_max_position_embeddings") or max_position)
    factor = float(scaling.get("factor") or max_position / original)
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = magnitude(float(mscale)) / magnitude(float(mscale_all)) if mscale and mscale_all else magnitude(1.0)

    def dimension_of(num_rotations: float) -> float:
        return rotary_dim * math.log(original / (num_rotations * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = dimension_of(float(scaling.get("beta_fast") or 32.0))
    high = dimension_of(float(scaling.get("beta_slow") or 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rotary_dim - 1.0)
    if low == high:
        high += 0.001
    mixed = []
    for i, frequency in enumerate(inv_freq):
        ramp = min(1.0, max(0.0, (i - low) / (high - low)))  # 0 = keep the frequency, 1 = interpolate it
        mixed.append(frequency * (1.0 - ramp) + frequency / factor * ramp)
    return RopeConfig(inv_freq=tuple(mixed), attention_factor=float(attention_factor))
