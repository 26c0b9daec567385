"""Kimi Linear (arXiv 2510.26692): Kimi Delta Attention, each fourth layer latent attention without positions (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, DeltaConfig, GateConfig, LatentAttentionConfig, LayerConfig, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import MIXTRAL_NAMES
from antiphon.models.layers.rope_config import RopeConfig, check_rotary_dim

ARCHITECTURES = ("KimiLinearForCausalLM",)

_NAMES = replace(
    MIXTRAL_NAMES,
    shared="block_sparse_moe.shared_experts.",
    correction_bias="block_sparse_moe.gate.e_score_correction_bias",
)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"hidden_act": "silu", "mla_use_nope": True, "moe_router_activation_func": "sigmoid", "use_grouped_topk": True})
    refuse(raw, {"moe_layer_freq": 1, "attention_bias": False})
    for field in ("num_key_value_heads", "head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters"):
        _ = raw.get(field)  # the latent is shared by all heads, and nothing is rotated
    num_shared = int(_either(raw, "num_shared_experts", "n_shared_experts", 0))
    moe = MoEConfig(
        gate=GateConfig(
            num_experts=int(_either(raw, "num_experts", "num_local_experts")),
            top_k=int(_either(raw, "num_experts_per_token", "num_experts_per_tok")),
            scoring="sigmoid",
            choice="group_limited",
            num_groups=int(_either(raw, "num_expert_group", "n_group", 1)),
            num_kept_groups=int(raw.get("topk_group") or 1),
            group_score="top2_sum",
            has_correction_bias=True,
            renormalise=bool(_either(raw, "moe_renormalize", "norm_topk_prob", True)),
            scale=float(raw.get("routed_scaling_factor", 1.0)),
        ),
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=num_shared * int(raw["moe_intermediate_size"]),
    )
    latent, delta, dense = _latent(raw), _delta(raw), dense_ffn(raw)
    layers = [
        LayerConfig(attention=delta if is_linear else latent, ffn=moe if is_sparse else dense, names=_NAMES)
        for is_linear, is_sparse in zip(_linear_layers(raw), _sparse_layers(raw), strict=True)
    ]
    max_position = int(_either(raw, "model_max_length", "max_position_embeddings"))
    return decoder(raw, "kimi_linear", layers, max_position=max_position, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))


def _either(raw: Mapping[str, Any], published: str, other: str, default: Any = None) -> Any:
    """A field under the published name or transformers' own."""
    first, second = raw.get(published), raw.get(other)
    if first is not None and second is not None and first != second:
        raise UnsupportedModel(f"{published} is {first!r}, but {other} is {second!r}", published)
    found = first if first is not None else second if second is not None else default
    if found is None:
        raise KeyError(published)
    return found


def _latent(raw: Mapping[str, Any]) -> LatentAttentionConfig:
    nope_dim, rope_dim = int(raw["qk_nope_head_dim"]), int(raw["qk_rope_head_dim"])
    check_rotary_dim(rope_dim, "qk_rope_head_dim")
    q_rank = raw.get("q_lora_rank")
    return LatentAttentionConfig(
        num_heads=int(raw["num_attention_heads"]),
        q_rank=None if q_rank is None else int(q_rank),
        kv_rank=int(raw["kv_lora_rank"]),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=int(raw["v_head_dim"]),
        rope=RopeConfig(inv_freq=(0.0,) * (rope_dim // 2)),  # order is in the other layers' states
        scale=(nope_dim + rope_dim) ** -0.5,
        interleaved=False,
        norm_eps=1e-6,
    )


def _delta(raw: Mapping[str, Any]) -> DeltaConfig:
    section = raw.get("linear_attn_config") or {}
    names = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim", "short_conv_kernel_size": "linear_conv_kernel_dim"}
    for key in section:
        if key not in (*names, "full_attn_layers", "kda_layers"):
            raise UnsupportedModel(f"{key} = {section[key]!r} is not known to this family", f"linear_attn_config.{key}")
    sizes = {}
    for key, name in names.items():
        value = section[key] if section.get(key) is not None else raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModel(f"{key} = {value!r}: expected a positive integer", f"linear_attn_config.{key}")
        sizes[key] = value
    return DeltaConfig(
        num_key_heads=sizes["num_heads"],
        num_heads=sizes["num_heads"],
        key_dim=sizes["head_dim"],
        value_dim=sizes["head_dim"],
        kernel_size=sizes["short_conv_kernel_size"],
        form="kimi",
        norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
    )


def _linear_layers(raw: Mapping[str, Any]) -> list[bool]:
    """From transformers' ``layer_types`` or from the published section, which counts layers from one."""
    num_layers, kinds, section = int(raw["num_hidden_layers"]), raw.get("layer_types"), raw.get("linear_attn_config") or {}
    if kinds is not None:
        for kind in kinds:
            if kind not in ("linear_attention", "full_attention"):
                raise UnsupportedModel(f"layers of type {kind!r} are not supported", "layer_types")
        if len(kinds) != num_layers:
            raise UnsupportedModel(f"{len(kinds)} layer types for {num_layers} layers", "layer_types")
        return [kind == "linear_attention" for kind in kinds]
    linear, full = set(section["kda_layers"]), set(section["full_attn_layers"])
    if linear | full != set(range(1, num_layers + 1)) or linear & full:
        raise UnsupportedModel("every layer must be in one of kda_layers and full_attn_layers", "linear_attn_config.kda_layers")
    return [i + 1 in linear for i in range(num_layers)]


def _sparse_layers(raw: Mapping[str, Any]) -> list[bool]:
    num_layers, kinds = int(raw["num_hidden_layers"]), raw.get("mlp_layer_types")
    first = raw.get("first_k_dense_replace")
    if kinds is None:
        return [i >= int(1 if first is None else first) for i in range(num_layers)]
    if len(kinds) != num_layers or set(kinds) - {"dense", "sparse"}:
        raise UnsupportedModel("each layer must be dense or sparse", "mlp_layer_types")
    return [kind == "sparse" for kind in kinds]
