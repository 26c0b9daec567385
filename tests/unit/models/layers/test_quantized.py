"""Int8 weights: close to the original, half the memory, the same by either path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from antiphon.models.layers.quantized import Int8Linear
from antiphon.testing import LocalCluster, wiring


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_rounded_weights(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias, x = (
        torch.randn(outputs, inputs, dtype=dtype),
        torch.randn(outputs, dtype=dtype),
        torch.randn(rows, inputs).to(dtype),
    )
    step = weight.float().abs().amax(dim=1) / 127
    rounded = (weight.float() / step[:, None]).round() * step[:, None].to(dtype).float()
    expected = F.linear(x.float(), rounded, bias.float())
    got = Int8Linear(weight, bias)(x).float()
    assert (got - expected).abs().max() < (1e-4 if dtype is torch.float32 else 0.02) * expected.abs().max()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=101,
            max_position_embeddings=256,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        )
    )
    path = tmp_path_factory.mktemp("int8")
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def logits_and_bytes(checkpoint: Path, **sections: object) -> tuple[torch.Tensor, int]:
    spec = wiring(checkpoint, "afd", expert_groups=2, dtype="bfloat16", cache={"numBlocks": 32}, **sections)  # type: ignore[arg-type]
    with LocalCluster(spec, checkpoint) as cluster:
        halves = cluster.generating[0].worker.halves
        compute, seen = halves.logits, []
        halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        cluster.generate(list(range(40)), max_tokens=1, num_logprobs=1)
        return seen[0], sum(sum(worker.halves.resident_bytes.values()) for worker in cluster.ffns)


def test_int8_experts_take_little_more_than_half_the_memory_and_hardly_change_logits(checkpoint: Path) -> None:
    whole, whole_bytes = logits_and_bytes(checkpoint)
    int8, int8_bytes = logits_and_bytes(checkpoint, model={"quantization": "int8"})
    assert int8_bytes < 0.55 * whole_bytes
    assert (int8 - whole).abs().max() < 0.1 * whole.std()


def test_shared_experts_and_down_projections_can_stay_as_they_are(checkpoint: Path) -> None:
    _, whole = logits_and_bytes(checkpoint)
    sizes = [
        logits_and_bytes(checkpoint, model={"quantization": "int8"}, experts={"keep": keep})[1] / whole
        for keep in ([], ["shared"], ["down"], ["shared", "down"])
    ]
    # Per layer: 8 experts, and one shared on each of two groups, of equal size; a down projection is a third of one. Scales come on
    # top: four bytes to 64 weights of one byte here.
    assert sizes == pytest.approx([0.5, 0.6, 2 / 3, 0.6 + 0.4 / 3], abs=0.035)
