"""DeepSeek-V2, V3 and V3.2 (arXiv 2405.04434, 2412.19437, 2512.02556): latent attention, shared experts (control speed).

The first layers are dense. In V3.2 a row sees the tokens that an indexer chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, GateConfig, IndexConfig, LatentAttentionConfig, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import DEEPSEEK_NAMES, listed_sparse_layers, mixed_layers, num_experts
from antiphon.models.layers.rope_config import rope_config, rope_settings, rope_type

_FAMILIES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
}
ARCHITECTURES = tuple(_FAMILIES)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    name = raw["architectures"][0]
    is_v3 = name != "DeepseekV2ForCausalLM"
    _ = raw.get("num_key_value_heads")  # the latent is shared by all heads
    attention = latent_attention(raw, interleaved=bool(raw.get("rope_interleave", True)) if is_v3 else True)
    if name == "DeepseekV32ForCausalLM":
        attention = replace(attention, index=_index(raw))
    moe = MoEConfig(
        gate=sigmoid_gate(raw) if is_v3 else _v2_gate(raw),
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["moe_intermediate_size"]) * int(raw.get("n_shared_experts") or 0),
    )
    refuse(raw, {"mlp_bias": False})
    layers = mixed_layers(listed_sparse_layers(raw), attention, dense_ffn(raw), moe, names=DEEPSEEK_NAMES)
    return decoder(raw, _FAMILIES[name], layers)


def _index(raw: Mapping[str, Any]) -> IndexConfig:
    """The indexer of every layer."""
    num_layers = int(raw["num_hidden_layers"])
    refuse(raw, {"layer_types": ["indexed_attention"] * num_layers})
    return IndexConfig(num_heads=int(raw["index_n_heads"]), head_dim=int(raw["index_head_dim"]), top_k=int(raw["index_topk"]))


def latent_attention(
    raw: Mapping[str, Any], *, interleaved: bool, q_factor: float = 1.0, kv_factor: float = 1.0, default_theta: float = 10_000.0
) -> LatentAttentionConfig:
    """Latent attention with DeepSeek's field names."""
    rope_dim, nope_dim = int(raw["qk_rope_head_dim"]), int(raw["qk_nope_head_dim"])
    _ = raw.get("head_dim"), raw.get("qk_head_dim")  # follow from the two above
    scale = (rope_dim + nope_dim) ** -0.5
    rope_scaling = rope_settings(raw)
    weight = float(rope_scaling.get("mscale_all_dim") or 0.0)
    if weight and rope_type(rope_scaling) != "default":
        factor = float(rope_scaling["factor"])
        scale *= (0.1 * weight * math.log(factor) + 1.0) ** 2 if factor > 1.0 else 1.0
    q_rank = raw.get("q_lora_rank")
    rope = rope_config(raw, rope_dim, int(raw["max_position_embeddings"]), default_theta=default_theta)
    if rope.rotary_dim != rope_dim:
        raise UnsupportedModel("a part of the rotated dimensions is not supported", "partial_rotary_factor")
    return LatentAttentionConfig(
        num_heads=int(raw["num_attention_heads"]),
        q_rank=None if q_rank is None else int(q_rank),
        kv_rank=int(raw["kv_lora_rank"]),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=int(raw["v_head_dim"]),
        rope=rope,
        scale=scale,
        interleaved=interleaved,
        norm_eps=1e-6,
        bias=bool(raw.get("attention_bias", False)),
        q_factor=q_factor,
        kv_factor=kv_factor,
    )


def sigmoid_gate(raw: Mapping[str, Any]) -> GateConfig:
    """V3's gate: sigmoid scores, a bias for the choice, the best groups by their two best experts."""
    refuse(raw, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    return GateConfig(
        num_experts=num_experts(raw),
        top_k=int(raw["num_experts_per_tok"]),
        scoring="sigmoid",
        choice="group_limited",
        num_groups=int(raw.get("n_group") or 1),
        num_kept_groups=int(raw.get("topk_group") or 1),
        group_score="top2_sum",
        has_correction_bias=True,
        renormalise=bool(raw.get("norm_topk_prob", False)),
        scale=float(raw.get("routed_scaling_factor", 1.0)),
    )


def _v2_gate(raw: Mapping[str, Any]) -> GateConfig:
    refuse(raw, {"scoring_func": "softmax", "norm_topk_prob": False})
    method = raw.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModel(f"topk_method {method!r} is not supported", "topk_method")
    limited = method == "group_limited_greedy"
    groups, kept = raw.get("n_group"), raw.get("topk_group")
    return GateConfig(
        num_experts=num_experts(raw),
        top_k=int(raw["num_experts_per_tok"]),
        choice="group_limited" if limited else "top_k",
        num_groups=int(groups or 1) if limited else 1,
        num_kept_groups=int(kept or 1) if limited else 1,
        scale=float(raw.get("routed_scaling_factor", 1.0)),
    )
