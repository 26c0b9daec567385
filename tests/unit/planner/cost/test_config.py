"""Config files of every family become shapes, and what can't be planned is named."""

import json

import pytest
import transformers

from antiphon.core.errors import CheckpointInvalid, InvalidInput, UnknownModel, UnsupportedModel
from antiphon.planner.cost.config import shape_of
from antiphon.planner.cost.library import find_model, model_names, read_model
from antiphon.planner.cost.shape import LinearAttention, SoftmaxAttention

NAMES = {
    "deepseek-v3", "kimi-k2", "qwen3-235b-a22b", "qwen3-32b", "llama-4-maverick", "minimax-m1", "ernie-4.5",
    "pangu-pro-moe", "step-3", "qwen3-30b-a3b", "mixtral-8x7b", "smollm2-135m", "llama-3.1-8b", "llama-3.3-70b", "gpt-oss-20b",
    "gpt-oss-120b", "glm-4.5", "glm-4.5-air", "deepseek-v3.2", "step-3.7-flash", "gemma-2-27b",
    "kimi-linear-48b-a3b", "qwen3-next-80b-a3b", "qwen3.5-27b",
}  # fmt: skip
DENSE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_library_has_these_models():
    assert set(model_names()) == NAMES


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownModel, match="step-3"):
        find_model("gpt-17")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", transformers.LlamaConfig),
        ("qwen3", transformers.Qwen3Config),
        ("qwen3_moe", transformers.Qwen3MoeConfig),
        ("mixtral", transformers.MixtralConfig),
        ("deepseek_v3", transformers.DeepseekV3Config),
        ("ernie4_5_moe", transformers.Ernie4_5_MoeConfig),
        ("glm4_moe", transformers.Glm4MoeConfig),
        ("glm4_moe_lite", transformers.Glm4MoeLiteConfig),
    ],
)
def test_the_parameters_of_small_models_are_those_that_transformers_builds(name, kind):
    torch = pytest.importorskip("torch")
    fields = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "intermediate_size": 48, "vocab_size": 200, "tie_word_embeddings": False}  # fmt: skip
    fields |= {
        "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v3": {
            "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        },
        "glm4_moe": {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "use_qk_norm": True},
        "glm4_moe_lite": {
            "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 12,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
        },
        "ernie4_5_moe": {
            "moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1,
        },
    }.get(name, {})  # fmt: skip
    config = kind(**fields)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    ours = shape_of(json.loads(config.to_json_string(use_diff=False)), name)
    # Norms inside attention, rotary tables and routing biases are not weights that a row multiplies.
    theirs = sum(
        p.numel()
        for key, p in built.named_parameters()
        if not any(part in key for part in ("q_norm", "k_norm", "a_layernorm", "e_score_correction", "moe_statics"))
    )
    assert ours.total_weights == theirs


def test_a_missing_field_is_named():
    with pytest.raises(InvalidInput, match="num_hidden_layers") as error:
        shape_of({key: value for key, value in DENSE.items() if key != "num_hidden_layers"}, "tiny")
    assert error.value.field == "num_hidden_layers"


@pytest.mark.parametrize("value", [-1, 2.5, "64", True])
def test_a_field_that_is_no_count_is_named(value):
    with pytest.raises(InvalidInput, match="hidden_size"):
        shape_of(DENSE | {"hidden_size": value}, "tiny")


def test_layers_whose_cost_is_not_modelled_are_refused():
    with pytest.raises(UnsupportedModel, match="mamba"):
        shape_of(DENSE | {"mamba_d_state": 16}, "tiny")
    with pytest.raises(UnsupportedModel, match="conv"):
        shape_of(DENSE | {"layer_types": ["conv"] * 3}, "tiny")


def test_windows_chunks_and_linear_layers_are_told_apart():
    mixed = shape_of(
        DENSE | {"layer_types": ["full_attention", "sliding_attention", "linear_attention"], "sliding_window": 16}, "mixed"
    )
    full, sliding, linear = (layer.attention for layer in mixed.layers)
    assert isinstance(full, SoftmaxAttention)
    assert full.window is None
    assert isinstance(sliding, SoftmaxAttention)
    assert sliding.window == 16
    assert isinstance(linear, LinearAttention)


QWEN3_NEXT = {  # of Qwen3-Next-80B-A3B's config.json
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
KIMI_LINEAR = {  # of Kimi-Linear-48B-A3B's
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [i for i in range(1, 28) if i not in (4, 8, 12, 16, 20, 24, 27)],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("config", "total", "active", "num_full"),
    [  # model cards: "80B in total, 3B activated" (without embeddings), "48B total, 3B activated"
        pytest.param(QWEN3_NEXT, 80e9, 3.88e9, 12, id="Qwen3-Next-80B-A3B"),
        pytest.param(KIMI_LINEAR, 49e9, 3.5e9, 7, id="Kimi-Linear-48B-A3B"),
    ],
)
def test_gated_delta_layers_are_priced(config: dict[str, object], total: float, active: float, num_full: int):
    shape = shape_of(config, "hybrid")
    assert shape.total_weights == pytest.approx(total, rel=0.01)
    assert shape.activated_weights == pytest.approx(active, rel=0.04)
    linear = [layer.attention for layer in shape.layers if isinstance(layer.attention, LinearAttention)]
    assert len(linear) == shape.num_layers - num_full
    assert {each.state_values for each in linear} == {32 * 128 * 128 + 3 * (8192 if num_full == 12 else 3 * 4096)}


def test_a_text_config_inside_a_multimodal_one_is_read():
    assert shape_of({"text_config": DENSE, "vision_config": {"hidden_size": 7}}, "vl") == shape_of(DENSE, "vl")


def test_a_checkpoint_directory_is_read_with_the_formats_it_says(tmp_path):
    quantised = DENSE | {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    model = read_model(tmp_path)
    assert (model.formats.weights, model.formats.kv, model.shape.num_layers) == ("fp8", "bf16", 3)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        read_model(tmp_path)
