"""Step-3, text (arXiv 2507.19427): multi-matrix factorization attention, a shared expert (control speed).

The published checkpoint has a vision tower too, beside the text's tensors, and the text's config in a section of its own; text is
what is served of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, GateConfig, LayerNames, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention
from antiphon.models.families.fields import Fields, activation
from antiphon.models.families.sparse import mixed_layers

_WITH_VISION = "Step3VLForConditionalGeneration"
ARCHITECTURES = ("Step3TextForCausalLM", _WITH_VISION)

_NAMES = LayerNames(
    q_expand="wq",
    q_rank_norm="inter_norm",
    router="moe.gate.weight",
    stacked_experts="moe.",
    shared="share_expert.",
)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    if raw["architectures"][0] == _WITH_VISION:
        return _text_of(raw)
    if int(raw["num_attention_groups"]) != 1:
        raise UnsupportedModel("all query heads share one K and one V head", "num_attention_groups")
    max_position = int(raw.get("max_position_embedding") or raw["max_seq_len"])
    _ = raw.get("max_seq_len")
    usual = {
        **{key: raw[key] for key in ("hidden_size", "num_attention_heads", "head_dim")},
        **{key: raw[key] for key in ("rope_theta", "rope_scaling", "rope_parameters") if raw.get(key) is not None},
        "num_key_value_heads": 1,
        "max_position_embeddings": max_position,
    }
    attention = replace(grouped_attention(usual, default_theta=500_000.0), q_rank=int(raw["share_q_dim"]))
    gate = GateConfig(
        num_experts=int(raw["moe_num_experts"]),
        top_k=int(raw["moe_top_k"]),
        renormalise=bool(raw.get("norm_expert_weight", False)),
    )
    moe = MoEConfig(
        gate=gate,
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["share_expert_dim"]),
    )
    sparse = raw["moe_layers_enum"]
    indices = {int(i) for i in (sparse.split(",") if isinstance(sparse, str) else sparse)}
    is_sparse = [i in indices for i in range(int(raw["num_hidden_layers"]))]
    layers = mixed_layers(is_sparse, attention, dense_ffn(raw), moe, names=_NAMES)
    return decoder(raw, "step3", layers, max_position=max_position, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))


def _text_of(raw: Mapping[str, Any]) -> DecoderConfig:
    for name in ("vision_config", "understand_projector_stride", "projector_bias", "image_token_id"):
        _ = raw.get(name)  # of images
    _ = raw.get("hidden_size")  # the section says it too
    section = dict(raw["text_config"])
    for name in ("eos_token_id", "tie_word_embeddings"):
        outer = raw.get(name)
        if section.get(name) is None and outer is not None:
            section[name] = outer
    text = Fields({**section, "architectures": ["Step3TextForCausalLM"]})
    config = describe(text)
    text.refuse_unread()
    return config
