"""Configs of published models give the sizes their reports state, and no field of theirs is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import transformers as hf

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import AttentionConfig, DecoderConfig, DeltaConfig, FFNConfig, LayerConfig, ShortConvConfig
from antiphon.models.families import describe
from antiphon.models.families.fields import _HARMLESS

# Fields of the checkpoints' config.json; those of transformers' classes are the defaults of their config classes.
STEP3: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 64,
    "num_attention_groups": 1,
    "num_hidden_layers": 61,
    "max_seq_len": 65536,
    "vocab_size": 128815,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 5120,
    "moe_num_experts": 48,
    "moe_top_k": 3,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embedding": 65536,
    "share_expert_dim": 5120,
    "share_q_dim": 2048,
    "head_dim": 256,
    "norm_expert_weight": False,
    "moe_layers_enum": ",".join(str(i) for i in range(4, 60)),
}
STEP3_VL: dict[str, Any] = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "model_type": "step3_vl",
    "vision_config": {"hidden_size": 1792, "output_hidden_size": 4096, "num_hidden_layers": 63, "patch_size": 14},
    "text_config": STEP3,
    "understand_projector_stride": 2,
    "projector_bias": False,
    "image_token_id": 128001,
    "hidden_size": 7168,
    "tie_word_embeddings": False,
    "eos_token_id": 128805,
}
LONGCAT: dict[str, Any] = {
    "architectures": ["LongcatFlashForCausalLM"],
    "model_type": "longcat_flash",
    "attention_bias": False,
    "attention_method": "MLA",
    "ffn_hidden_size": 12288,
    "hidden_size": 6144,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_topk": 12,
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "n_routed_experts": 512,
    "num_attention_heads": 64,
    "num_layers": 28,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000.0,
    "routed_scaling_factor": 6.0,
    "router_bias": False,
    "router_dtype": "float32",
    "norm_topk_prob": False,
    "v_head_dim": 128,
    "vocab_size": 131072,
    "zero_expert_num": 256,
    "zero_expert_type": "identity",
    "expert_ffn_hidden_size": 2048,
}
PANGU: dict[str, Any] = {
    "architectures": ["PanguProMoEForCausalLM"],
    "model_type": "PanguProMoE",
    "vocab_size": 153376,
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 16000000.0,
    "moe_intermediate_size": 1344,
    "shared_expert_intermediate_size": 5376,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}


GPT_OSS: dict[str, Any] = {  # the 120b
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
GPT_OSS_20B = {**GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}
GPT_OSS_20B |= {"layer_types": ["sliding_attention", "full_attention"] * 12}


_STEP_KINDS = [
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "sliding_attention",
] * 12  # the last 3 of them predict more
STEP37: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "num_hidden_layers": 45,
    "num_nextn_predict_layers": 3,
    "max_seq_len": 262144,
    "max_position_embeddings": 262144,
    "vocab_size": 128896,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "head_dim": 128,
    "use_moe": True,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_intermediate_size": 1280,
    "share_expert_dim": 1280,
    "moe_layers_enum": ",".join(str(i) for i in range(3, 45)),
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "att_impl_type": "GQA",
    "use_head_wise_attn_gate": True,
    "sliding_window": 512,
    "layer_types": _STEP_KINDS,
    "rope_theta": [5e6 if kind == "full_attention" else 1e4 for kind in _STEP_KINDS],
    "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in _STEP_KINDS],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 131072,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": ["full_attention"],
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
    },
    "swiglu_limits": [0.0] * 43 + [7.0] * 2 + [0.0] * 3,
    "swiglu_limits_shared": [0.0] * 43 + [16.0] * 2 + [0.0] * 3,
    "tie_word_embeddings": False,
    "use_cache": True,
}
STEP37_VL: dict[str, Any] = {
    "architectures": ["Step3p7ForConditionalGeneration"],
    "model_type": "step3p7",
    "vision_config": {"model_type": "perception_encoder", "width": 1536, "layers": 47, "heads": 16, "image_size": 728},
    "text_config": STEP37,
    "understand_projector_stride": 2,
    "projector_bias": False,
    "image_token_id": 128001,
}
DEEPSEEK_V32: dict[str, Any] = {
    **hf.DeepseekV32Config().to_dict(),
    "architectures": ["DeepseekV32ForCausalLM"],
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}

KIMI_LINEAR: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
LFM2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_use_swiglu": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "hidden_size": 2048,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "use_pos_enc": True,
    "vocab_size": 65536,
}


GLM_45: dict[
    str, Any
] = {  # GLM-4.7's file, which differs in the positions; its FP8 file also says what every model of the family does
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_dtype": "float32",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
GLM_45_AIR = {**GLM_45, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "use_qk_norm": False}
GLM_45_AIR |= {"n_routed_experts": 128, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_hidden_layers": 46}


def of(name: str, config: Any) -> dict[str, Any]:
    return {**config.to_dict(), "architectures": [name]}


DOTS1 = {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
DOTS1 |= {"num_hidden_layers": 62, "hidden_size": 4096, "moe_intermediate_size": 1408, "intermediate_size": 10944}
DEEPSEEK_V2 = {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128}
DEEPSEEK_V2 |= {"q_lora_rank": 1536, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160}
DEEPSEEK_V2 |= {"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400}
QWEN3 = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
QWEN3 |= {"moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}

GEMMA2_9B = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
GEMMA2_9B |= {"intermediate_size": 14336, "query_pre_attn_scalar": 256}
GEMMA2_27B = {"hidden_size": 4608, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
GEMMA2_27B |= {"intermediate_size": 36864, "query_pre_attn_scalar": 144}

MODELS: dict[str, tuple[Mapping[str, Any], float, float]] = {  # config; parameters and activated parameters in billions
    "Step-3, text": (STEP3, 316.0, 38.0),
    "Step-3, the text of a published checkpoint": (STEP3_VL, 316.0, 38.0),
    "Pangu Pro MoE": (PANGU, 71.99, 16.50),
    "LongCat-Flash": (LONGCAT, 560.0, 31.3),  # activated at most: none of a token's experts is a zero-computation one
    "DeepSeek-V3": (of("DeepseekV3ForCausalLM", hf.DeepseekV3Config()), 671.0, 37.0),
    "DeepSeek-V2": (of("DeepseekV2ForCausalLM", hf.DeepseekV2Config(**DEEPSEEK_V2)), 236.0, 21.0),
    "dots.llm1": (of("Dots1ForCausalLM", hf.Dots1Config(**DOTS1)), 142.0, 14.0),
    "Phi-3.5-MoE": (of("PhimoeForCausalLM", hf.PhimoeConfig()), 41.9, 6.6),
    "Qwen3-235B-A22B": (of("Qwen3MoeForCausalLM", hf.Qwen3MoeConfig(**QWEN3)), 235.0, 22.0),
    # arXiv 2408.00118, table 2: embedding and other parameters.
    "Gemma 2 2B": (of("Gemma2ForCausalLM", hf.Gemma2Config()), 0.590 + 2.024, 0.590 + 2.024),
    "Gemma 2 9B": (of("Gemma2ForCausalLM", hf.Gemma2Config(**GEMMA2_9B)), 0.918 + 8.324, 0.918 + 8.324),
    "Gemma 2 27B": (of("Gemma2ForCausalLM", hf.Gemma2Config(**GEMMA2_27B)), 1.180 + 26.047, 1.180 + 26.047),
    # Their card: 196B parameters, 11B activated without embeddings.
    "Step-3.5-Flash": (STEP37, 196.0, 11.0 + 1.06),
    "Step-3.7-Flash, the text of a published checkpoint": (STEP37_VL, 196.0, 11.0 + 1.06),
    "DeepSeek-V3.2": (DEEPSEEK_V32, 671.0, 37.0),  # V3's, and an indexer a layer
    # Their cards: 355B and 32B, 106B and 12B, without embeddings; 30B and 3B, rounded down; 744B and 40B.
    "GLM-4.5": (GLM_45, 355.0, 32.0 + 1.55),
    "GLM-4.5-Air": (GLM_45_AIR, 106.0 + 1.24, 12.0 + 1.24),
    "GLM-4.7-Flash": (of("Glm4MoeLiteForCausalLM", hf.Glm4MoeLiteConfig()), 30.0, 3.89),
    "GLM-5": (of("GlmMoeDsaForCausalLM", hf.GlmMoeDsaConfig()), 744.0, 40.0),
    # arXiv 2508.10925, table 1; its activated ones leave out one of the two embeddings.
    "gpt-oss-120b": (GPT_OSS, 116.83, 5.13 + 0.58),
    "gpt-oss-20b": (GPT_OSS_20B, 20.91, 3.61 + 0.58),
    # Their cards: 80B and 3B, 48B and 3B, 35B and 3B, 1.17B; the activated ones are rounded down and leave out embeddings.
    "Qwen3-Next-80B-A3B": (of("Qwen3NextForCausalLM", hf.Qwen3NextConfig()), 79.67, 3.88),
    "Kimi-Linear-48B-A3B": (KIMI_LINEAR, 49.1, 3.5),
    "Qwen3.5-35B-A3B": (of("Qwen3_5MoeForCausalLM", hf.Qwen3_5MoeTextConfig()), 35.0 - 0.45, 3.5),  # without its vision tower
    "LFM2-1.2B": (LFM2, 1.17, 1.17),
    "Mixtral 8x7B": (of("MixtralForCausalLM", hf.MixtralConfig()), 46.7, 12.9),
}


def attention_parameters(layer: LayerConfig, hidden: int) -> int:
    a = layer.attention
    if isinstance(a, ShortConvConfig):
        return 4 * hidden * hidden
    if isinstance(a, DeltaConfig):
        values = a.num_heads * a.value_dim
        gates = a.key_dim * (2 * hidden + 2 * values) if a.form == "kimi" else hidden * (values + a.num_heads)
        return hidden * (a.conv_width + values + a.num_heads) + gates
    if isinstance(a, AttentionConfig):
        q = hidden * a.num_heads * a.head_dim if a.q_rank is None else a.q_rank * (hidden + a.num_heads * a.head_dim)
        q *= 2 if a.has_output_gate else 1
        return q + 2 * hidden * a.num_kv_heads * a.head_dim + a.num_heads * a.head_dim * hidden
    q_width = a.num_heads * (a.nope_dim + a.rope_dim)
    q = hidden * q_width if a.q_rank is None else a.q_rank * (hidden + q_width)
    kv = hidden * (a.kv_rank + a.rope_dim) + a.kv_rank * a.num_heads * (a.nope_dim + a.v_dim)
    return q + kv + a.num_heads * a.v_dim * hidden


def parameters(config: DecoderConfig) -> tuple[float, float]:
    """All and activated, both embeddings included, in billions; norms and biases are too small to count."""
    total = active = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    for number, ffn in enumerate(config.ffns):
        if ffn is None:
            continue
        if number < config.num_layers:
            attention = attention_parameters(config.layers[number], config.hidden_size)
            total, active = total + attention, active + attention
        if isinstance(ffn, FFNConfig):
            total, active = (each + 3 * config.hidden_size * ffn.intermediate_size for each in (total, active))
        else:
            width, gate = ffn.intermediate_size, ffn.gate
            total += 3 * config.hidden_size * (width * gate.num_experts + ffn.shared_intermediate_size)
            active += 3 * config.hidden_size * (width * gate.top_k + ffn.shared_intermediate_size)
    return total / 1e9, active / 1e9


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_has_the_published_size(name: str) -> None:
    raw, total, active = MODELS[name]
    counted = parameters(describe(raw))
    assert counted[0] == pytest.approx(total, rel=0.01)
    assert counted[1] == pytest.approx(active, rel=0.04)


EVERY: dict[str, Mapping[str, Any]] = {
    **{name: raw for name, (raw, _, _) in MODELS.items()},
    "Gemma 3": of("Gemma3ForCausalLM", hf.Gemma3TextConfig()),
    "Llama": of("LlamaForCausalLM", hf.LlamaConfig()),
    "OLMo 2": of("Olmo2ForCausalLM", hf.Olmo2Config()),
    "OLMoE": of("OlmoeForCausalLM", hf.OlmoeConfig()),
    "Qwen2": of("Qwen2ForCausalLM", hf.Qwen2Config()),
    "Qwen3": of("Qwen3ForCausalLM", hf.Qwen3Config()),
    "Qwen2-MoE": of("Qwen2MoeForCausalLM", hf.Qwen2MoeConfig()),
    "LongCat-Flash of transformers": of("LongcatFlashForCausalLM", hf.LongcatFlashConfig()),
}
# Fields that no result depends on, and why.
NO_EFFECT: dict[str, str] = {
    "block_multiple_of": "the width is a multiple of twice as much",
    "block_ff_dim": "rounded up to a multiple",
    "max_seq_len": "max_position_embedding says it",
    "_sliding_window_pattern": "layer_types says it",
    "max_window_layers": "layer_types says it",
    "layer_types": "without windows all layers are of one type",
    "sliding_window": "use_sliding_window turns it off",
    "router_jitter_noise": "while training only, but for SparseMixer",
    "input_jitter_noise": "while training only",
    "intermediate_size": "no layer is dense",
    "mlp_only_layers": "a number beyond the last layer, or none removed",
    "num_key_value_heads": "the latent is shared by all heads",
    "qk_head_dim": "follows from its two parts",
    "head_dim": "follows from the latent's parts",
    "num_hidden_layers": "num_layers says it",
    "n_group": "V2's greedy gate has no groups",
    "topk_group": "V2's greedy gate has no groups",
    "rope_interleave": "V2 has one order",
    "moe_layer_freq": "frequencies beyond the layers",
    "vision_config": "text is served",
    "understand_projector_stride": "of images",
    "projector_bias": "of images",
    "image_token_id": "of images",
}
SAID_TWICE: dict[str, set[str]] = {  # fields of a model that another field of it says too
    "Step-3, the text of a published checkpoint": {"hidden_size", "eos_token_id", "tie_word_embeddings"},
}


def other_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value * 2 if value else 2, value + 1]
        case float():
            return [value * 1.5 + 0.25]
        case str():
            return ["something-else"]
        case None:
            return [True, 3, "something"]
        case list():
            return [[*value, "x"]]
        case dict():
            return [{**value, "unheard_of": 3}]
    return []


@pytest.mark.parametrize("name", EVERY)
def test_every_field_that_changes_is_honoured_or_refused(name: str) -> None:
    raw = EVERY[name]
    base = describe(raw)
    overlooked, unnamed = [], []
    for field in raw.keys() - _HARMLESS - NO_EFFECT.keys() - SAID_TWICE.get(name, set()):
        for value in other_values(raw[field]):
            try:
                if describe({**raw, field: value}) == base:
                    overlooked.append((field, value))
            except UnsupportedModel as error:
                if not error.field:
                    unnamed.append((field, value))
    assert not overlooked
    assert not unnamed
    with pytest.raises(UnsupportedModel) as caught:
        describe({**raw, "mystery_of_the_house": 0.5})
    assert caught.value.field == "mystery_of_the_house"


def test_the_text_of_a_checkpoint_with_vision_is_the_text_model() -> None:
    assert describe({**STEP3_VL, "eos_token_id": None}) == describe(STEP3)
    with pytest.raises(UnsupportedModel) as caught:
        describe({**STEP3_VL, "text_config": {**STEP3, "mystery_of_the_house": 0.5}})
    assert caught.value.field == "mystery_of_the_house"


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        (LONGCAT, "router_dtype", "bfloat16"),
        (LONGCAT, "norm_topk_prob", True),
        (LONGCAT, "zero_expert_type", "drop"),
        (LONGCAT, "mla_scale_q_lora", False),
        (PANGU, "norm_topk_prob", True),
        (PANGU, "rope_theta", None),
    ],
)
def test_what_other_programs_do_otherwise_is_refused(raw: dict[str, Any], field: str, value: Any) -> None:
    changed = {**raw, field: value}
    with pytest.raises(UnsupportedModel) as caught:
        describe({name: each for name, each in changed.items() if each is not None})
    assert caught.value.field == field
