"""antiphon inspect: counts equal to transformers', pools that add up, heat maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from typer.testing import CliRunner

from antiphon.cli.models.inspect import app
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import FFNShard
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.inventory import ffn_shard_bytes, take_inventory

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 199,
}
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SHAPE,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=50,
            mlp_only_layers=[1],
        )
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **SHAPE,
            q_lora_rank=24,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=8,
            moe_intermediate_size=36,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
        )
    ),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    made = MODELS[request.param]()
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    return path, made


def test_parameters_by_role_are_those_of_the_model(model: tuple[Path, Any]) -> None:
    path, made = model
    checkpoint = Checkpoint.open(path)
    config = describe(checkpoint.config)
    found = take_inventory(config, checkpoint, "float32")
    tensors = dict(made.state_dict())
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    groups = ExpertPlacement.spread(config, 2)
    held = sum(ffn_shard_bytes(config, FFNShard.of(i, num_tensor=3, num_expert=2), groups, 4) for i in range(6))
    # The shared expert is held by both groups.
    assert held == 4 * (found.dense_ffn_parameters + found.expert_parameters + 2 * found.shared_parameters)


def test_a_latent_cache_holds_one_latent_and_one_rotated_key_a_token() -> None:
    raw = {**MODELS["deepseek_v3"]().config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]}
    config = describe(raw)
    assert [(plane.num_heads, plane.head_dim) for plane in config.layers[0].attention.planes] == [(1, 32 + 8)]


def test_the_verb_shows_pools_and_heat(model: tuple[Path, Any], tmp_path: Path) -> None:
    load, png = tmp_path / "rows.json", tmp_path / "heat.png"
    load.write_text(json.dumps({"0": [1, 2, 3, 40], "2": [5, 5, 5, 5]}))
    args = [str(model[0]), "--attention", "2", "--groups", "2", "--slices", "2", "--load", str(load), "--png", str(png)]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "2A4F" in result.output
    assert "ffn 3" in result.output
    assert "3.48 x mean" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_load_file_that_is_none_is_refused(model: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[1]")
    result = CliRunner().invoke(app, [str(model[0]), "--load", str(tmp_path / "rows.json")])
    assert isinstance(result.exception, InvalidInput)
