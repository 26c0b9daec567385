"""Step-3.5 and 3.7, text: gated heads, more of them behind windows, sigmoid routing, bounds on some layers (control speed).

Published configs say of each layer what those that transformers writes say of each kind; both are read. Layers behind the last are
for predicting several tokens at once: their tensors are not read. The published Step-3.7 has a vision tower beside the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import AttentionConfig, DecoderConfig, FFNConfig, GateConfig, LayerConfig, LayerNames, MoEConfig
from antiphon.models.families.dense import decoder
from antiphon.models.families.fields import Fields, optional_number, refuse
from antiphon.models.layers.rope_config import RopeConfig, rope_config

_WITH_VISION = "Step3p7ForConditionalGeneration"
ARCHITECTURES = ("Step3p5ForCausalLM", _WITH_VISION)

_NAMES = LayerNames(router="moe.gate.weight", correction_bias="moe.router_bias", stacked_experts="moe.", shared="share_expert.")
# What the published modelling has no other way for, or is computed here whatever it says.
_EXPECTED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "gating": True,
    "use_head_wise_attn_gate": True,
    "use_qk_norm": True,
    "zero_centered": True,
    "sink": False,
    "use_mfa": False,
    "att_impl_type": "GQA",
    "use_moe": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "use_bidirectional_attention": False,
    "use_rope_layers": [],
    "yarn_only_types": ["full_attention"],
}


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    if raw["architectures"][0] == _WITH_VISION:
        return _text_of(raw)
    refuse(raw, _EXPECTED)
    num_layers = int(raw["num_hidden_layers"])
    _ = raw.get("mtp_layer_types"), raw.get("mtp_mlp_layer_types")
    kinds = _first(raw, "layer_types", num_layers, "full_attention")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModel(f"layers of type {kind!r} are not supported", "layer_types")
    is_sparse = _sparse(raw, num_layers)
    limits, shared_limits = (_first(raw, key, num_layers, None) for key in ("swiglu_limits", "swiglu_limits_shared"))
    max_position = _one(raw, "max_position_embeddings", "max_seq_len")
    ropes = _ropes(raw, kinds, max_position)
    layers = [
        LayerConfig(
            attention=_attention(raw, kinds[i], ropes[i]),
            ffn=_moe(raw, limits[i], shared_limits[i])
            if is_sparse[i]
            else FFNConfig(intermediate_size=int(raw["intermediate_size"]), limit=_limit(shared_limits[i])),
            names=_NAMES,
        )
        for i in range(num_layers)
    ]
    _check_heads(raw, kinds)
    return decoder(
        raw, "step3p7", layers, norm="rms_plus_one", max_position=max_position, norm_eps=float(raw.get("rms_norm_eps", 1e-5))
    )


def _attention(raw: Mapping[str, Any], kind: str, rope: RopeConfig) -> AttentionConfig:
    slides, head_dim = kind == "sliding_attention", int(raw["head_dim"])
    scalar = optional_number(raw, "query_pre_attn_scalar")
    window = raw.get("sliding_window")
    return AttentionConfig(
        num_heads=_sliding_heads(raw) if slides else int(raw["num_attention_heads"]),
        num_kv_heads=_one(raw, "num_key_value_heads", "num_attention_groups"),
        head_dim=head_dim,
        rope=rope,
        scale=(head_dim if scalar is None else scalar) ** -0.5,
        qk_norm="head",
        sliding_window=int(window) if slides and window else None,
        has_head_gate=True,
    )


def _moe(raw: Mapping[str, Any], limit: float | None, shared_limit: float | None) -> MoEConfig:
    gate = GateConfig(
        num_experts=_one(raw, "moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts"),
        top_k=_one(raw, "moe_top_k", "num_experts_per_tok"),
        scoring="sigmoid",
        has_correction_bias=True,
        renormalise=True,
        scale=float(raw.get("moe_router_scaling_factor", 1.0)),
    )
    return MoEConfig(
        gate=gate,
        intermediate_size=int(raw["moe_intermediate_size"]),
        limit=_limit(limit),
        shared_intermediate_size=_one(raw, "share_expert_dim", "share_expert_dims"),
        shared_limit=_limit(shared_limit),
    )


def _limit(bound: float | None) -> float | None:
    return float(bound) if bound else None  # 0 stands for none


def _sliding_heads(raw: Mapping[str, Any]) -> int:
    """Heads of layers behind a window; what else may differ there is refused where it does."""
    told, other = raw.get("num_sliding_attention_heads"), raw.get("attention_other_setting") or {}
    same = {
        "num_attention_heads": other.get("num_attention_heads"),
        "attention_type": "sliding_attention",
        "num_attention_groups": _one(raw, "num_key_value_heads", "num_attention_groups"),
        "head_dim": int(raw["head_dim"]),
        "true_head_dim": int(raw["head_dim"]),
    }
    for key, value in other.items():
        if key not in same or value != same[key]:
            raise UnsupportedModel(f"attention_other_setting.{key} = {value!r} is not supported", "attention_other_setting")
    return int(told or other.get("num_attention_heads") or raw["num_attention_heads"])


def _check_heads(raw: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """What transformers says of single layers must be what the kinds say."""
    for index, settings in (raw.get("per_layer_config") or {}).items():
        slides = int(index) < len(kinds) and kinds[int(index)] == "sliding_attention"
        if not slides or settings != {"num_attention_heads": _sliding_heads(raw)}:
            raise UnsupportedModel(f"per_layer_config.{index} = {settings!r} is not supported", "per_layer_config")


def _ropes(raw: Mapping[str, Any], kinds: Sequence[str], max_position: int) -> list[RopeConfig]:
    """Each layer's rotation: of its kind, or by lists of bases and rotated shares; scaling is for layers that see all."""
    head_dim, sections = int(raw["head_dim"]), raw.get("rope_parameters") or {}
    scaling, theta, shares = raw.get("rope_scaling"), raw.get("rope_theta"), raw.get("partial_rotary_factors")
    thetas = _first(raw, "rope_theta", len(kinds), None) if isinstance(theta, list) else [theta] * len(kinds)
    factors = _first(raw, "partial_rotary_factors", len(kinds), None)
    if any(key in kinds for key in sections):
        if scaling or theta or shares:
            raise UnsupportedModel("rope_parameters of each kind and rope_theta, rope_scaling or factors", "rope_parameters")
        unknown = sorted(sections.keys() - {"sliding_attention", "full_attention"})
        if unknown:
            raise UnsupportedModel(f"rope_parameters of {unknown[0]!r} layers are not supported", f"rope_parameters.{unknown[0]}")
        return [rope_config({}, head_dim, max_position, scaling=sections[kind]) for kind in kinds]
    if sections:
        raise UnsupportedModel("rope_parameters say nothing of kinds of layers", "rope_parameters")
    found = []
    for i, kind in enumerate(kinds):
        each: dict[str, Any] = {**scaling} if scaling and kind == "full_attention" else {}
        each["rope_theta"] = thetas[i] or 10_000.0
        if factors[i]:
            each["partial_rotary_factor"] = factors[i]
        found.append(rope_config({}, head_dim, max_position, scaling=each))
    return found


def _sparse(raw: Mapping[str, Any], num_layers: int) -> list[bool]:
    kinds, listed = raw.get("mlp_layer_types"), raw.get("moe_layers_enum")
    if kinds is not None:
        if set(kinds) - {"sparse", "dense"}:
            raise UnsupportedModel(f"mlp_layer_types = {kinds!r} are not supported", "mlp_layer_types")
        return [kind == "sparse" for kind in _first(raw, "mlp_layer_types", num_layers, "sparse")]
    indices = range(3, num_layers) if listed is None else (listed.split(",") if isinstance(listed, str) else listed)
    sparse = {int(i) for i in indices}
    return [i in sparse for i in range(num_layers)]


def _first(raw: Mapping[str, Any], key: str, num_layers: int, default: Any) -> list[Any]:
    """A list's entries for the layers that are served: those behind them predict several tokens at once."""
    listed, extra = raw.get(key), int(raw.get("num_nextn_predict_layers") or 0)
    if listed is None:
        return [default] * num_layers
    if len(listed) not in (num_layers, num_layers + extra):
        raise UnsupportedModel(f"{key} has {len(listed)} entries for {num_layers} layers", key)
    return list(listed[:num_layers])


def _one(raw: Mapping[str, Any], *names: str) -> int:
    """A number under any of its names; two that disagree are refused."""
    found = {name: int(raw[name]) for name in names if raw.get(name) is not None}
    if not found:
        raise KeyError(names[0])
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise UnsupportedModel(f"a number is said twice, and differently: {said}", next(iter(found)))
    return next(iter(found.values()))


def _text_of(raw: Mapping[str, Any]) -> DecoderConfig:
    for name in ("vision_config", "understand_projector_stride", "projector_bias", "image_token_id"):
        _ = raw.get(name)  # of images
    _ = raw.get("hidden_size"), raw.get("max_position_embeddings")  # the section says them too
    section = dict(raw["text_config"])
    for name in ("eos_token_id", "tie_word_embeddings"):
        outer = raw.get(name)
        if section.get(name) is None and outer is not None:
            section[name] = outer
    text = Fields({**section, "architectures": ["Step3p5ForCausalLM"]})
    config = describe(text)
    text.refuse_unread()
    return config
