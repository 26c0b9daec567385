"""LongCat-Flash (arXiv 2509.01322): two attentions, two dense FFNs, and experts on a shortcut across them (control speed).

A block is two layers here. The shortcut leaves behind the first attention and joins after the second FFN, so the experts' whole
round trip hides behind the rest of the block. Zero-computation experts return the row itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, FFNConfig, GateConfig, LayerConfig, LayerNames, MoEConfig
from antiphon.models.families.deepseek import latent_attention
from antiphon.models.families.dense import decoder
from antiphon.models.families.fields import activation, refuse

ARCHITECTURES = ("LongcatFlashForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    _ = raw.get("num_key_value_heads"), raw.get("num_hidden_layers")
    refuse(raw, {"attention_bias": False, "router_bias": False, "zero_expert_type": "identity", "attention_method": "MLA"})
    refuse(raw, {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "rope_interleave": True})
    refuse(raw, {"router_dtype": "float32", "norm_topk_prob": False})
    _ = raw.get("params_dtype")  # of training; the checkpoint's tensors say theirs
    hidden = int(raw["hidden_size"])
    attention = latent_attention(
        raw,
        interleaved=True,
        q_factor=(hidden / int(raw["q_lora_rank"])) ** 0.5,
        kv_factor=(hidden / int(raw["kv_lora_rank"])) ** 0.5,
        default_theta=1e7,
    )
    moe = MoEConfig(
        gate=GateConfig(
            num_experts=int(raw["n_routed_experts"]),
            top_k=int(raw["moe_topk"]),
            has_correction_bias=True,
            scale=float(raw.get("routed_scaling_factor", 6.0)),
            num_identity=int(raw.get("zero_expert_num") or 0),
        ),
        intermediate_size=int(raw["expert_ffn_hidden_size"]),
        activation=activation(raw),
    )
    dense = FFNConfig(intermediate_size=int(raw["ffn_hidden_size"]), activation=activation(raw))
    layers = []
    for block in range(int(raw["num_layers"])):
        for half in range(2):
            names = LayerNames(
                input_norm=f"input_layernorm.{half}",
                ffn_norm=f"post_attention_layernorm.{half}",
                attention=f"self_attn.{half}.",
                ffn=f"mlps.{half}.",
                router="mlp.router.classifier.weight",
                correction_bias="mlp.router.e_score_correction_bias",
            )
            layer = LayerConfig(attention=attention, ffn=dense, names=names, prefix=f"model.layers.{block}.")
            layers.append(replace(layer, shortcut=moe) if half == 0 else layer)
    return decoder(raw, "longcat_flash", layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))
