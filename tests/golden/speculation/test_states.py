"""Speculation with models that keep a state per sequence changes no token: wrong guesses leave nothing behind in any state.

Every family with such layers, every wiring, against the same without drafts. The drafter knows the answers and errs now and then,
so that every number of right guesses comes about; blocks are small, so that guesses cross the places of snapshots.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from antiphon.core.request import OutputRules, RequestId
from antiphon.engine.speculation.drafter import DraftAsked, Proposal
from antiphon.engine.speculation.speculator import Speculator
from antiphon.models.native.library import available
from antiphon.testing import LocalCluster, unsettle, wiring, write_tiny_llama

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 92, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 384, "max_position_embeddings": 512,
}  # fmt: skip
DELTA: dict[str, Any] = {
    **SHAPE, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MOE: dict[str, Any] = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 40,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**DELTA, **MOE)),
    "qwen3_5": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**DELTA)),
    "kimi_linear": lambda: hf.KimiLinearForCausalLM(
        hf.KimiLinearConfig(
            **{**SHAPE, "num_key_value_heads": 4, "q_lora_rank": None}, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=12, num_local_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1, moe_intermediate_size=36,
            linear_head_dim=16, linear_num_heads=3, layer_types=["linear_attention", "full_attention"] * 2, pad_token_id=0,
            mlp_layer_types=["sparse"] * 4,
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SHAPE, full_attn_idxs=[1, 3], block_multiple_of=8, conv_bias=True)),
}  # fmt: skip
WIRINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "monolith": ("monolith", {}),
    "P/D": ("pd", {}),
    "2A2F, two ubatches": ("afd", {"attention": 2, "ffn": 2, "transport": {"numUbatches": 2}}),
    "P/D + AFD": ("pd-afd", {"ffn_replicas": 2, "transport": {"numUbatches": 2}}),
}
SCHEMA = (
    'start: %json {"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"type": "integer", '
    '"maximum": 99999, "minimum": 0}}, "required": ["a", "b"], "additionalProperties": false}'
)
REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 40, "num_logprobs": 2},
    {"max_tokens": 33, "temperature": 1.0, "seed": 11, "num_logprobs": 2},
    {"max_tokens": 36, "repetition_penalty": 1.3, "num_logprobs": 0},
    {"max_tokens": 40, "temperature": 0.9, "seed": 3, "rules": OutputRules(grammar=SCHEMA), "eos": [1]},
    {"max_tokens": 40, "temperature": 1.0, "seed": 8, "eos": list(range(100, 140)), "num_logprobs": 0},
    {"max_tokens": 50, "speculates": False},
]
SMALL: dict[str, Any] = {"numBlocks": 48, "blockSizeTokens": 4, "snapshotBlocks": 2}

Answers = list[tuple[list[int], list[tuple[int, float]]]]


def prompts() -> list[list[int]]:
    chance = random.Random(4)
    stem = [chance.randrange(2, 250) for _ in range(19)]
    return [stem[: 19 - 3 * n] + [chance.randrange(2, 250) for _ in range(1 + n % 3)] for n in range(len(REQUESTS))]


class Knowing:
    """Drafts answers that it was told, with slips."""

    name, priors, is_free = "knowing", (0.7,), True

    def __init__(self, answers: Mapping[RequestId, list[int]], slips: float) -> None:
        self.answers, self.slips = answers, slips
        self.chance = random.Random(1)

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> dict[RequestId, Proposal]:
        found = {}
        for request_id, wanted in asked.items():
            whole = self.answers[request_id]
            drafts = whole[len(wanted.token_ids) : len(wanted.token_ids) + wanted.num_drafts]
            found[request_id] = Proposal(token_ids=tuple(d if self.chance.random() > self.slips else 2 + d % 200 for d in drafts))
        return {request_id: proposal for request_id, proposal in found.items() if proposal.token_ids}

    def forget(self, request_id: RequestId) -> None:
        pass


class Always(Speculator):
    """As many drafts as there may be, whatever they bring."""

    def _counts(self, ids: Any, proposals: Any, num_rows: int, room: int) -> list[int]:
        super()._counts(ids, proposals, num_rows, room)
        return [len(proposal.token_ids) for proposal in proposals]


def submit(cluster: LocalCluster, topology: str) -> list[RequestId]:
    return [
        cluster.submit(prompt, on=i % len(cluster.generating), prefill=0 if "pd" in topology else None, **request)
        for i, (prompt, request) in enumerate(zip(prompts(), REQUESTS, strict=True))
    ]


def answers(
    path: Path, topology: str, *, known: Answers | None = None, dtype: str = "float32", rounds: int = 1, **sections: Any
) -> tuple[Answers, LocalCluster]:
    """What the last of ``rounds`` of the same requests got; ``known``: told to the drafter, None = ``sections`` say who drafts."""
    speculation: dict[str, Any] = {} if known is None else {"speculation": {}}
    base: dict[str, Any] = {"cache": SMALL, "scheduler": {"maxNumBatchedTokens": 64, "remotePrefillMinTokens": 4}}
    with LocalCluster(wiring(path, topology, dtype=dtype, **{**speculation, **base, **sections}), path) as cluster:
        if known is not None:
            for part in cluster.generating:
                told = {
                    RequestId(f"request-{turn * len(REQUESTS) + i}"): prompt + known[i][0]
                    for turn in range(rounds)
                    for i, prompt in enumerate(prompts())
                }
                part.engine.scheduler.speculator = Always(Knowing(told, 0.15), max_drafts=6, clock=cluster.clock)
        for _ in range(rounds):
            ids = submit(cluster, topology)
            cluster.run()
        found = [cluster.outputs[each] for each in ids]
        assert [each.error for each in found] == [None] * len(found)
        for part in (*cluster.generating, *cluster.prefilling):
            scheduler = part.engine.scheduler
            assert scheduler.blocks.num_free_blocks == cluster.facts.num_blocks
            assert scheduler.slots is not None
            assert scheduler.slots.num_free_slots == scheduler.slots.num_slots
        return [(each.token_ids, [(e.token_id, e.logprob) for e in each.logprobs]) for each in found], cluster


def taken(cluster: LocalCluster) -> tuple[int, int]:
    """Drafts that were right, and those that were wrong."""
    stats = [part.engine.scheduler.speculator.stats for part in cluster.generating if part.engine.scheduler.speculator is not None]
    right, drafts = sum(each.num_taken for each in stats), sum(each.num_drafts for each in stats)
    return right, drafts - right


def near(found: Answers) -> list[Any]:
    return [(tokens, [(token, pytest.approx(value, abs=1e-4)) for token, value in logprobs]) for tokens, logprobs in found]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = FAMILIES[request.param]().eval()
    unsettle(model)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    words = write_tiny_llama(tmp_path_factory.mktemp("words"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, path / name)
    return path


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Answers:
    return answers(checkpoint, "monolith")[0]


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_answers_as_without_drafts(checkpoint: Path, plain: Answers, name: str) -> None:
    topology, counts = WIRINGS[name]
    found, cluster = answers(checkpoint, topology, known=plain, **counts)
    assert found == near(plain)
    right, wrong = taken(cluster)
    assert right > 60
    assert wrong > 20


def test_preempted_requests_and_those_that_begin_at_a_snapshot_answer_as_without_drafts(checkpoint: Path, plain: Answers) -> None:
    """In the second round, prompts and answers of the first are found up to snapshots, those behind right guesses among them."""
    found, cluster = answers(checkpoint, "monolith", known=plain, rounds=2)
    assert found == near(plain)
    cached = [output.last.num_cached_tokens for output in cluster.outputs.values() if output.last is not None]
    assert max(cached) > 0
    found, cluster = answers(checkpoint, "monolith", known=plain, cache={**SMALL, "numBlocks": 24})
    assert cluster.generating[0].engine.scheduler.stats.num_preemptions > 0
    assert found == near(plain)


@pytest.mark.skipif(not available(), reason="sums depend on the batch without our kernels")
@pytest.mark.parametrize("topology", ["monolith", "afd"])
def test_bits_are_those_without_drafts_in_bf16(checkpoint: Path, topology: str) -> None:
    cache = {**SMALL, "numBlocks": 128}  # nobody is preempted: latent attention rounds a prompt's rows otherwise than decodes
    plain, _ = answers(checkpoint, topology, dtype="bfloat16", cache=cache)
    found, cluster = answers(checkpoint, topology, dtype="bfloat16", known=plain, cache=cache)
    assert all(part.engine.scheduler.stats.num_preemptions == 0 for part in cluster.generating)
    assert found == plain
    assert min(taken(cluster)) > 20


def test_look_up_in_prompt_and_answer_changes_no_token(checkpoint: Path, plain: Answers) -> None:
    found, _ = answers(checkpoint, "monolith", speculation={"drafter": "ngram", "maxDrafts": 6})
    assert found == near(plain)
