"""A mixture of experts in bf16: bit for bit the same in every wiring where a row's sum is made in one place, and elsewhere as near
to fp32 as the monolith is. Where several shards share a row, each rounds its partial sum to bf16, so that bits can't be equal.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.layers.linear import sums_by_row
from antiphon.testing import LocalCluster, wiring

EXPERTS, VOCAB = 12, 199
needs_own_sums = pytest.mark.skipif(not sums_by_row(), reason="there are no kernels, and others' sums in bf16 depend on the batch")
Row = tuple[int, float]  # a token and its log probability

ONE_PLACE: dict[str, tuple[str, dict[str, int]]] = {
    "1A1F": ("afd", {}),
    "2A1F": ("afd", {"attention": 2}),
    "P/D": ("pd", {}),
    "P/D + AFD": ("pd-afd", {}),
}
SPREAD: dict[str, tuple[str, dict[str, int]]] = {
    "2A3F, experts spread": ("afd", {"attention": 2, "expert_groups": 3}),
    "1A4F, experts spread": ("afd", {"expert_groups": 4}),
    "P/D + 2A2F": ("pd-afd", {"attention": 2, "expert_groups": 2}),
}
SLICED: dict[str, tuple[str, dict[str, int]]] = {
    "2A3F, slices": ("afd", {"attention": 2, "ffn": 3}),
    "1A4F, both": ("afd", {"ffn": 2, "expert_groups": 2}),
}


def make(path: Path, top_k: int) -> Path:
    torch.manual_seed(3)
    model = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=top_k,
            norm_topk_prob=top_k > 1,
            vocab_size=VOCAB,
            max_position_embeddings=256,
        )
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.dim() > 1 and "embed" not in name:
                tensor.mul_(4.0)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("top1"), 1)


@pytest.fixture(scope="module")
def four_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("top4"), 4)


def spec_of(path: Path, topology: str, counts: dict[str, int], dtype: str = "bfloat16") -> Any:
    scheduler = {"maxNumBatchedTokens": 48, "remotePrefillMinTokens": 8}
    return wiring(path, topology, dtype=dtype, cache={"numBlocks": 64}, scheduler=scheduler, **counts)


def prompts() -> list[list[int]]:
    chance = random.Random(4)
    return [[chance.randrange(VOCAB) for _ in range(n)] for n in (1, 19, 90)]


def serve(cluster: LocalCluster, num_tokens: int = 24) -> list[list[Row]]:
    """All prompts at once, whole prompts' blocks handed over where there is a prefill worker."""
    prefill = 0 if cluster.prefilling else None
    ids = [
        cluster.submit(p, max_tokens=num_tokens, num_logprobs=0, on=i % len(cluster.generating), prefill=prefill)
        for i, p in enumerate(prompts())
    ]
    cluster.run()
    return [[(entry.token_id, entry.logprob) for entry in cluster.outputs[i].logprobs] for i in ids]


def answers(path: Path, topology: str, counts: dict[str, int], dtype: str = "bfloat16") -> list[list[Row]]:
    with LocalCluster(spec_of(path, topology, counts, dtype), path) as cluster:
        return serve(cluster)


@needs_own_sums
@pytest.mark.parametrize("name", ONE_PLACE)
def test_bits_are_equal_where_one_ffn_worker_has_all_experts(four_experts: Path, name: str) -> None:
    assert answers(four_experts, *ONE_PLACE[name]) == answers(four_experts, "monolith", {})


@needs_own_sums
@pytest.mark.parametrize("name", SPREAD)
def test_bits_are_equal_where_experts_are_spread_and_a_row_has_one(one_expert: Path, name: str) -> None:
    assert answers(one_expert, *SPREAD[name]) == answers(one_expert, "monolith", {})


def test_copies_and_moves_of_experts_change_no_bit_where_a_row_has_one(one_expert: Path) -> None:
    expected = answers(one_expert, "monolith", {})
    with LocalCluster(spec_of(one_expert, "afd", {"expert_groups": 3}), one_expert) as cluster:
        chance = random.Random(9)
        for extra in (0, 5):
            rows = {n: [chance.random() for _ in range(EXPERTS)] for n in range(3)}
            placement = ExpertPlacement.balanced(cluster.facts.config, rows, 3, extra)
            cluster.rebalance(placement)
            assert serve(cluster) == expected


@pytest.mark.parametrize("name", [*SPREAD, *SLICED])
def test_partial_sums_in_bf16_are_as_near_to_fp32_as_the_monolith(four_experts: Path, name: str) -> None:
    exact = answers(four_experts, "monolith", {}, "float32")

    def error(found: list[list[Row]]) -> float:
        """Mean over the tokens before bf16 and fp32 part: behind them the texts differ."""
        pairs = []
        for ours, theirs in zip(found, exact, strict=True):
            for (token, value), (other, wanted) in zip(ours, theirs, strict=True):
                if token != other:
                    break
                pairs.append(abs(value - wanted))
        assert len(pairs) >= 8
        return sum(pairs) / len(pairs)

    assert error(answers(four_experts, *(SPREAD | SLICED)[name])) < 2.0 * error(answers(four_experts, "monolith", {})) + 1e-3
