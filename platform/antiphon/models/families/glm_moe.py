"""GLM-4.5 to 4.7, GLM-4.7-Flash and GLM-5 (arXiv 2508.06471, 2602.15763): DeepSeek-V3's experts in all of them (control speed).

Attention is grouped-query with half of each head rotated, q and k normed per head in the large ones; Flash has DeepSeek-V3's latent
attention, GLM-5 DeepSeek-V3.2's with another order of the indexer's rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import AttentionConfig, DecoderConfig, IndexConfig, LatentAttentionConfig, MoEConfig
from antiphon.models.families.deepseek import latent_attention, sigmoid_gate
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import DEEPSEEK_NAMES, listed_sparse_layers, mixed_layers
from antiphon.models.layers.rope_config import rope_config, rope_settings

_GROUPED, _LATENT, _SPARSE = "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM"
_FAMILIES = {_GROUPED: "glm4_moe", _LATENT: "glm4_moe_lite", _SPARSE: "glm_moe_dsa"}
_FIRST_DENSE = {_GROUPED: 1, _LATENT: 1, _SPARSE: 3}  # layers, where the config does not say
ARCHITECTURES = tuple(_FAMILIES)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    name = raw["architectures"][0]
    refuse(raw, {"moe_layer_freq": 1, "moe_router_dtype": "float32", "mlp_bias": False})
    attention = _grouped(raw) if name == _GROUPED else _latent(raw)
    if name == _SPARSE and isinstance(attention, LatentAttentionConfig):
        attention = replace(attention, index=_index(raw))
    shared = raw.get("n_shared_experts")
    moe = MoEConfig(
        gate=replace(sigmoid_gate(raw), renormalise=bool(raw.get("norm_topk_prob", True))),
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["moe_intermediate_size"]) * int(1 if shared is None else shared),
    )
    sparse = listed_sparse_layers(raw, default_first=_FIRST_DENSE[name])
    layers = mixed_layers(sparse, attention, dense_ffn(raw), moe, names=DEEPSEEK_NAMES)
    return decoder(raw, _FAMILIES[name], layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))


def _grouped(raw: Mapping[str, Any]) -> AttentionConfig:
    settings = rope_settings(raw)
    share = settings.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 0.5
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"]))
    scaling = {**settings, "partial_rotary_factor": share}
    return grouped_attention(
        raw,
        qkv_bias=bool(raw.get("attention_bias", False)),
        qk_norm="head" if raw.get("use_qk_norm", False) else "none",
        rope=rope_config(raw, head_dim, int(raw["max_position_embeddings"]), scaling=scaling),
    )


def _latent(raw: Mapping[str, Any]) -> LatentAttentionConfig:
    _ = raw.get("num_key_value_heads")  # the latent is shared by all heads
    return latent_attention(raw, interleaved=bool(raw.get("rope_interleave", True)))


def _index(raw: Mapping[str, Any]) -> IndexConfig:
    """The indexer of every layer. GLM-5.2 has fewer of them, whose choices the layers behind share."""
    num_layers = int(raw["num_hidden_layers"])
    refuse(raw, {"layer_types": ["indexed_attention"] * num_layers, "rope_interleave": True, "indexer_rope_interleave": True})
    refuse(raw, {"indexer_types": ["full"] * num_layers, "index_topk_freq": 1})
    refuse(raw, {"index_topk_pattern": "F" * num_layers})
    return IndexConfig(
        num_heads=int(raw["index_n_heads"]),
        head_dim=int(raw["index_head_dim"]),
        top_k=int(raw["index_topk"]),
        interleaved=True,
    )
