"""Checkpoints in 8-bit floats with a scale per block are read as the products, whole or in parts, and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights
from antiphon.testing import LocalCluster, wiring

SECTION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantized(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block: the largest value becomes 448, the largest of the format."""
    rows, cols = weight.shape
    scale = torch.zeros(-(-rows // size), -(-cols // size))
    stored = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            span = (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size))
            scale[r, c] = weight[span].abs().max() / 448
            stored[span] = (weight[span] / scale[r, c]).to(torch.float8_e4m3fn)
    return stored, scale


def restored(stored: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    rows, cols = stored.shape
    return torch.tensor([[float(stored[r, c]) * float(scale[r // size, c // size]) for c in range(cols)] for r in range(rows)])


def weights_of(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Weights:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return Weights(Checkpoint.open(path), torch.float32, torch.device("cpu"))


def test_any_part_of_a_weight_is_its_values_times_their_blocks_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, scale = quantized(torch.randn(20, 27) * torch.rand(20, 1), 8)
    config = {"quantization_config": {**SECTION, "weight_block_size": [8, 8]}}
    weights = weights_of(tmp_path, {"w.weight": stored, "w.weight_scale_inv": scale}, config)
    whole = restored(stored, scale, 8)
    assert torch.equal(weights.read("w.weight"), whole)
    assert torch.equal(weights.read("w.weight", rows=(5, 17), cols=(9, 27)), whole[5:17, 9:27])
    assert torch.equal(weights.read("w.weight", rows=(8, 8), cols=(0, 3)), whole[8:8, 0:3])
    assert torch.equal(weights.read("w.weight", dtype=torch.bfloat16), whole.bfloat16())


def test_8_bit_floats_without_scales_are_refused(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, {"w.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, {"quantization_config": SECTION})
    with pytest.raises(CheckpointInvalid, match="without a scale per block"):
        weights.read("w.weight")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quant_method": "hqq"}, "quantization_config.quant_method"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size"),
        ({"bits": 4}, "quantization_config.bits"),
    ],
)
def test_other_quantisation_is_refused_by_its_field(change: dict[str, Any], field: str) -> None:
    raw = {**hf.LlamaConfig().to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": {**SECTION, **change}}
    with pytest.raises(UnsupportedModel) as caught:
        describe(raw)
    assert caught.value.field == field


def test_a_deepseek_v3_checkpoint_in_8_bit_floats_gives_the_tokens_of_its_restored_weights(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = hf.DeepseekV3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=101,
        max_position_embeddings=128,
        n_routed_experts=8,
        moe_intermediate_size=40,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )
    model = hf.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(tmp_path / "plain")
    tensors, plain = {}, load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in plain.items():
        if tensor.dim() == 2 and ("_proj" in name):
            tensors[name], tensors[name + "_scale_inv"] = quantized(tensor, 32)
            plain[name] = restored(tensors[name], tensors[name + "_scale_inv"], 32)
        else:
            tensors[name] = tensor
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    small = tmp_path / "fp8"
    small.mkdir()
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    section = {**SECTION, "weight_block_size": [32, 32]}
    (small / "config.json").write_text(json.dumps({**raw, "quantization_config": section}))
    save_file(tensors, small / "model.safetensors")
    answers = []
    for path, counts in ((tmp_path / "plain", {}), (small, {}), (small, {"ffn": 3})):
        spec = wiring(path, "afd" if counts else "monolith", cache={"numBlocks": 16}, **counts)
        with LocalCluster(spec, path) as cluster:
            answers.append(cluster.generate(list(range(5, 40)), max_tokens=24))
    assert answers[0] == answers[1] == answers[2]
