"""Edges of routing through the served split 2A3F: ties, every expert chosen, one expert, none of the rows, all of them, one row,
gates that give no numbers. Tokens equal transformers', or the request ends with the layer's name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from antiphon.core.request import FinishReason
from antiphon.testing import LocalCluster, wiring

VOCAB = 97
TOKENS = 12

Edit = Callable[[torch.nn.Module], None]


def make(path: Path, num_experts: int, top_k: int, edit: Edit = lambda _gate: None) -> hf.PreTrainedModel:
    torch.manual_seed(11)
    model = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
            vocab_size=VOCAB,
            max_position_embeddings=128,
        )
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1 and "embed" not in name:
                tensor.mul_(4.0)
        for layer in model.model.layers:
            edit(layer.mlp.gate)
    model.save_pretrained(path)
    return model


def prompts() -> list[list[int]]:
    chance = random.Random(6)
    return [[chance.randrange(VOCAB) for _ in range(n)] for n in (1, 9, 30)]


def served(path: Path, asked: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens by prompt from 2A3F, and rows by worker and expert of layer 0."""
    spec = wiring(path, "afd", attention=2, expert_groups=3, cache={"numBlocks": 64}, transport={"numUbatches": 2})
    with LocalCluster(spec, path) as cluster:
        ids = [cluster.submit(prompt, max_tokens=TOKENS, on=i % 2) for i, prompt in enumerate(asked)]
        cluster.run()
        rows = [worker.halves.rows_by_expert()[0] for worker in cluster.ffns]
        return [cluster.outputs[name].token_ids for name in ids], rows


def greedy(model: hf.PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def tie_all(gate: torch.nn.Module) -> None:
    gate.weight.zero_()  # every expert as likely as any other, for every row


def tie_pairs(gate: torch.nn.Module) -> None:
    gate.weight[1::2] = gate.weight[::2]  # experts 2i and 2i + 1 always tie


def starve(gate: torch.nn.Module) -> None:
    """Experts 0 and 3 are the opposite of 1 and 4: in each pair one gets a row only where the other would not."""
    gate.weight[0], gate.weight[3] = -gate.weight[1], -gate.weight[4]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "edit"),
    [
        pytest.param(6, 6, lambda _gate: None, id="k equal to the number of experts"),
        pytest.param(1, 1, lambda _gate: None, id="one expert"),
        pytest.param(6, 2, starve, id="opposed experts"),
        pytest.param(6, 6, tie_all, id="k equal to the number of experts, all tied"),
    ],
)
def test_tokens_equal_transformers_in_2a3f(tmp_path: Path, num_experts: int, top_k: int, edit: Edit) -> None:
    model = make(tmp_path, num_experts, top_k, edit)
    answers, rows = served(tmp_path, prompts())
    assert answers == [greedy(model, prompt) for prompt in prompts()]
    # Every row computes exactly top_k experts, over all workers.
    assert sum(map(sum, rows)) == top_k * sum(len(prompt) + TOKENS - 1 for prompt in prompts())


@pytest.mark.parametrize("edit", [tie_all, tie_pairs])
def test_ties_are_broken_alike_whatever_the_wiring(tmp_path: Path, edit: Edit) -> None:
    make(tmp_path, 6, 2, edit)
    answers, _ = served(tmp_path, prompts())
    with LocalCluster(wiring(tmp_path, "monolith", cache={"numBlocks": 64}), tmp_path) as cluster:
        assert [cluster.generate(prompt, max_tokens=TOKENS) for prompt in prompts()] == answers


def test_an_expert_may_get_every_row_and_the_others_none(tmp_path: Path) -> None:
    def favour(gate: torch.nn.Module) -> None:
        gate.weight.zero_()

    # Equal logits choose the same expert for every row: one has all rows, five have none.
    make(tmp_path, 6, 1, favour)
    answers, rows = served(tmp_path, prompts())
    by_expert = [sum(counts) for counts in zip(*rows, strict=True)]
    assert sorted(by_expert)[:-1] == [0] * 5
    assert max(by_expert) == sum(len(prompt) + TOKENS - 1 for prompt in prompts())
    with LocalCluster(wiring(tmp_path, "monolith", cache={"numBlocks": 64}), tmp_path) as cluster:
        assert [cluster.generate(prompt, max_tokens=TOKENS) for prompt in prompts()] == answers


def test_a_batch_of_one_row_goes_to_the_owners_of_its_experts_alone(tmp_path: Path) -> None:
    model = make(tmp_path, 6, 2)
    (answer,), _ = served(tmp_path, [[7]])
    assert answer == greedy(model, [7])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gate_whose_logits_are_no_numbers_is_named(tmp_path: Path, layer: int) -> None:
    calls = iter(range(2))

    def poison(gate: torch.nn.Module) -> None:
        if next(calls) == layer:
            gate.weight[2] = float("nan")

    make(tmp_path, 6, 2, poison)
    spec = wiring(tmp_path, "afd", attention=2, expert_groups=3, cache={"numBlocks": 64})
    with LocalCluster(spec, tmp_path) as cluster:
        name = cluster.submit([1, 2, 3], max_tokens=4, on=1)
        cluster.run()
        assert cluster.outputs[name].finish_reason is FinishReason.ERROR
        assert f"the gate of model.layers.{layer}" in str(cluster.outputs[name].error)
        assert cluster.outputs[name].token_ids == []
