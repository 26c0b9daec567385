"""GPTQ, AWQ and compressed-tensors: packed here word by word as each format says, read back bit for bit, and served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.inventory import take_inventory
from antiphon.models.loading.stored.four_bit import FourBit
from antiphon.models.loading.weights import Weights
from antiphon.testing import LocalCluster, wiring

GROUP = 16
Tensors = dict[str, torch.Tensor]


def word(codes: list[int]) -> int:
    """Eight codes, the first in the lowest bits, as a signed 32-bit number."""
    value = sum(code << (4 * place) for place, code in enumerate(codes))
    return value - 2**32 if value >= 2**31 else value


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [rows, columns], eight columns a word; ``order``: which column is at each place of a word."""
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.int64)
    padded[:, :columns] = codes
    made = [[word([row[at + i] for i in order]) for at in range(0, len(row), 8)] for row in padded.tolist()]
    return torch.tensor(made, dtype=torch.int32)


def dequantised(codes: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """[O, I]: (code - zero) * scale in the scale's own format, number by number."""
    return (codes - zeros[:, group_of]).to(scale.dtype) * scale[:, group_of]


def parts(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, zeros, scales and each input's group."""
    groups = -(-inputs // GROUP)
    codes, zeros = torch.randint(0, 16, (outputs, inputs)), torch.randint(1, 16, (outputs, groups))
    return codes, zeros, (torch.rand(outputs, groups) * 0.04 + 0.01).to(dtype), torch.arange(inputs) // GROUP


def gptq(stem: str, outputs: int, inputs: int, *, shuffled: bool = False, second: bool = False) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scale, group_of = parts(outputs, inputs, torch.float16)
    if shuffled:
        group_of = group_of[torch.randperm(inputs)]
    stored = {
        ".qweight": words(codes).T.contiguous(),
        ".qzeros": words((zeros - (0 if second else 1)).T),
        ".scales": scale.T.contiguous(),
        ".g_idx": group_of.to(torch.int32),
    }
    return {stem + suffix: tensor for suffix, tensor in stored.items()}, dequantised(codes, zeros, scale, group_of)


def awq(stem: str, outputs: int, inputs: int) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scale, group_of = parts(outputs, inputs, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {".qweight": words(codes.T, order), ".qzeros": words(zeros.T, order), ".scales": scale.T.contiguous()}
    return {stem + suffix: tensor for suffix, tensor in stored.items()}, dequantised(codes, zeros, scale, group_of)


def compressed(stem: str, outputs: int, inputs: int, *, symmetric: bool = True) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scale, group_of = parts(outputs, inputs, torch.bfloat16)
    stored = {
        ".weight_packed": words(codes),
        ".weight_scale": scale,
        ".weight_shape": torch.tensor([outputs, inputs]),
    }
    if symmetric:
        zeros = torch.full_like(zeros, 8)  # codes are 8 more than the signed numbers
    else:
        stored[".weight_zero_point"] = words(zeros.T).T.contiguous()
    return {stem + suffix: tensor for suffix, tensor in stored.items()}, dequantised(codes, zeros, scale, group_of)


def by_output(stem: str, outputs: int, inputs: int, *, floats: bool) -> tuple[Tensors, torch.Tensor]:
    scale = (torch.rand(outputs, 1) * 0.01 + 0.001).bfloat16()
    if floats:
        weight = (torch.randn(outputs, inputs) * 40).to(torch.float8_e4m3fn)
    else:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return {stem + ".weight": weight, stem + ".weight_scale": scale}, weight.to(torch.bfloat16) * scale


def section(kind: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
INT4 = section("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True, dynamic=False)
FP8 = section("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
INT8 = section("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)

Make = Callable[[str, int, int], tuple[Tensors, torch.Tensor]]
WAYS: dict[str, tuple[dict[str, Any], Make]] = {
    "gptq": (GPTQ, gptq),
    "gptq, inputs by importance": (GPTQ, lambda *shape: gptq(*shape, shuffled=True)),
    "gptq, its second format": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda *shape: gptq(*shape, second=True)),
    "awq": (AWQ, awq),
    "int4": (INT4, compressed),
    "int4 with zero points": (INT4, lambda *shape: compressed(*shape, symmetric=False)),
    "fp8 by output": (FP8, lambda *shape: by_output(*shape, floats=True)),
    "int8 by output": (INT8, lambda *shape: by_output(*shape, floats=False)),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_part_of_a_weight_is_read_bit_for_bit(tmp_path: Path, way: str) -> None:
    torch.manual_seed(0)
    config, make = WAYS[way]
    tensors, expected = make("layer", 40, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    weights = Weights(Checkpoint.open(tmp_path), torch.float32, torch.device("cpu"))
    assert torch.equal(weights.read("layer.weight"), expected.float())
    for rows, cols in (((8, 32), (16, 48)), ((5, 21), (7, 50)), ((0, 40), (33, 64)), ((3, 4), None)):
        part = expected[slice(*rows), slice(*(cols or (None,)))].float()
        assert torch.equal(weights.read("layer.weight", rows=rows, cols=cols), part)
        held = weights.part("layer.weight", rows=rows, cols=cols)
        if isinstance(held, FourBit):
            assert torch.equal(held.values(torch.float32), part)
    assert isinstance(weights.part("layer.weight"), FourBit) == ("8" not in way)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("plain")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101}
    hf.LlamaForCausalLM(hf.LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=128)).save_pretrained(path)
    return path


@pytest.mark.parametrize("way", ["gptq, inputs by importance", "awq", "int4 with zero points", "fp8 by output"])
def test_a_checkpoint_gives_the_tokens_of_its_restored_weights(plain: Path, tmp_path: Path, way: str) -> None:
    torch.manual_seed(2)
    config, make = WAYS[way]
    stored: Tensors = {}
    restored = load_file(plain / "model.safetensors")
    for name, tensor in restored.items():
        if "_proj" in name:
            added, values = make(name.removesuffix(".weight"), *tensor.shape)
            stored.update(added)
            restored[name] = values.float()
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**raw)).eval()
    model.load_state_dict(restored, strict=False)
    prompt = list(range(5, 40))
    for counts in ({}, {"ffn": 3}):
        spec = wiring(tmp_path, "afd" if counts else "monolith", cache={"numBlocks": 16}, **counts)
        with LocalCluster(spec, tmp_path) as cluster:
            answer = cluster.generate(prompt, max_tokens=24)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == answer
    checkpoint = Checkpoint.open(tmp_path)
    config_of = describe(checkpoint.config)
    assert take_inventory(config_of, checkpoint, "bfloat16").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({**GPTQ, "bits": 3}, "quantization_config.bits"),
        ({**AWQ, "version": "gemv"}, "quantization_config.version"),
        ({**AWQ, "mystery": 2}, "quantization_config.mystery"),
        ({**INT4, "format": "marlin-24"}, "quantization_config.format"),
        ({**INT4, "kv_cache_scheme": {"num_bits": 8}}, "quantization_config.kv_cache_scheme"),
        (
            section("pack-quantized", num_bits=8, type="int", strategy="group"),
            "quantization_config.config_groups.group_0.weights.num_bits",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization_config.quant_method"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], field: str) -> None:
    raw = {**hf.LlamaConfig().to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": config}
    with pytest.raises(UnsupportedModel) as caught:
        describe(raw)
    assert caught.value.field == field
