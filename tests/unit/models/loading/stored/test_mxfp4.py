"""gpt-oss's experts in MXFP4, as published: the values of the format, kept in four bits, and the tokens of the whole weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from antiphon.models.loading.stored.four_bit import FourBit
from antiphon.testing import LocalCluster, wiring


def e2m1(code: int) -> float:
    """OCP Microscaling Formats 1.0, §5.3.3: a sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = (code >> 1) & 3, (code & 1) / 2
    magnitude = mantissa if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


E2M1 = [e2m1(code) for code in range(16)]


def restored(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., O, I] from blocks [..., O, G, 16] and scales [..., O, G], by the format's words."""
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.tensor(E2M1, dtype=torch.float64)[halves.long()]
    return (values * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2).float()


def random_parts(*shape: int, around: int = 124) -> tuple[torch.Tensor, torch.Tensor]:
    *outer, inputs = shape
    blocks = torch.randint(0, 256, (*outer, inputs // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(around - 3, around + 2, (*outer, inputs // 32), dtype=torch.uint8)


def test_values_are_those_of_the_format_and_of_transformers() -> None:
    torch.manual_seed(0)
    blocks, scales = random_parts(2, 6, 96)
    scales[0, 0] = torch.tensor([0, 1, 254])  # the ends of the range
    parts = [
        FourBit(kind="e2m1", codes_OB=blocks[e].flatten(1), num_inputs=96, scale_OG=scales[e], group_size=32) for e in range(2)
    ]
    ours = torch.stack([part.values(torch.float32) for part in parts])
    assert torch.equal(ours, restored(blocks, scales))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
    assert torch.equal(torch.stack([part.values(torch.bfloat16) for part in parts])[1], theirs[1])
    cut = parts[1].cols(41, 90)
    assert torch.equal(cut.values(torch.float32), ours[1, :, 41:90])
    assert torch.equal(parts[1].cols(32, 96).values(torch.float32, 2, 5), ours[1, 2:5, 32:96])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model whole and as published."""
    torch.manual_seed(1)
    config = hf.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=101,
        max_position_embeddings=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
    )
    whole, small = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("small")
    hf.GptOssForCausalLM(config).save_pretrained(whole)
    plain = load_file(whole / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            stored[name + "_blocks"], stored[name + "_scales"] = random_parts(experts, outputs, inputs)
            plain[name] = restored(stored[name + "_blocks"], stored[name + "_scales"]).transpose(1, 2).contiguous()
        else:
            plain[name] = stored[name] = tensor * 4.0 if tensor.dim() == 2 and "embed" not in name else tensor
    save_file(plain, whole / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, small / "model.safetensors")
    raw: dict[str, Any] = json.loads((whole / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (small / "config.json").write_text(json.dumps(raw))
    return whole, small


@pytest.mark.parametrize("counts", [{}, {"ffn": 3}, {"expert_groups": 2}], ids=["monolith", "slices", "spread"])
def test_a_published_checkpoint_gives_the_tokens_of_its_restored_weights(
    published: tuple[Path, Path], counts: dict[str, int]
) -> None:
    whole, small = published
    model = hf.GptOssForCausalLM.from_pretrained(whole).eval()
    prompt = list(range(5, 40))
    with LocalCluster(wiring(small, "afd" if counts else "monolith", cache={"numBlocks": 16}, **counts), small) as cluster:
        answer = cluster.generate(prompt, max_tokens=24)
        banks = [bank for worker in cluster.ffns for bank in worker.halves.banks.values()]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(dim=-1).tolist() == answer
    if counts == {"expert_groups": 2}:  # 4.25 bits a weight
        assert sum(bank.num_bytes for bank in banks) == 2 * 4 * 3 * 64 * 64 * 17 // 32
