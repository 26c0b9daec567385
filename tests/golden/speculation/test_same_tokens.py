"""Speculation changes no token: every wiring with drafts against itself without, token for token and likelihood for likelihood.

The model repeats itself, as random ones do under greedy decoding, so that look-up is taken often; draws at high temperature are
mostly not. A drafter that knows the answer, and errs at random, reaches every place of acceptance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.core.request import FinishReason, OutputRules, RequestId, ThinkingRules
from antiphon.engine.speculation.drafter import DraftAsked, Proposal
from antiphon.engine.speculation.speculator import Speculator
from antiphon.testing import LocalCluster, wiring, write_tiny_llama, write_tiny_moe

WIRINGS: dict[str, tuple[str, dict[str, int]]] = {
    "monolith": ("monolith", {}),
    "P/D": ("pd", {}),
    "1A1F": ("afd", {}),
    "2A3F": ("afd", {"attention": 2, "ffn": 3}),
    "P/D + AFD": ("pd-afd", {"ffn": 2}),
}
SCHEMA = (
    'start: %json {"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"type": "integer", '
    '"maximum": 99999, "minimum": 0}}, "required": ["a", "b"], "additionalProperties": false}'
)
THINKING = ThinkingRules(start="<t>", end="</t>", end_token_ids=(60, 47, 116, 62), budget_tokens=9, is_open=True)
REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 40},
    {"max_tokens": 33, "temperature": 1.0, "seed": 11},
    {"max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 5, "num_logprobs": 3},
    {"max_tokens": 36, "num_logprobs": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"max_tokens": 28, "num_logprobs": 0},
    {"max_tokens": 40, "temperature": 0.9, "seed": 3, "rules": OutputRules(grammar=SCHEMA), "eos": [1]},
    {"max_tokens": 30, "rules": OutputRules(thinking=THINKING)},
    {"max_tokens": 40, "min_tokens": 12, "eos": list(range(30, 200))},
    {"max_tokens": 40, "temperature": 1.0, "seed": 8, "eos": list(range(100, 140)), "stop_token_ids": frozenset({77})},
    {"max_tokens": 20, "logit_bias": {65: 30.0, 66: 29.0}, "presence_penalty": 1.5},
    {"max_tokens": 1},
    {"max_tokens": 60, "speculates": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def prompts() -> list[list[int]]:
    chance = random.Random(4)
    piece = [chance.randrange(2, 250) for _ in range(12)]
    return [piece[: 1 + n] + [chance.randrange(2, 250) for _ in range(n % 3)] + piece[: n % 7] for n in range(len(REQUESTS))]


Answers = list[tuple[list[int], list[Any], FinishReason | None, int | None]]


class Knowing:
    """Drafts answers that it was told, with slips."""

    name, priors, is_free = "knowing", (0.7,), True

    def __init__(self, answers: Mapping[RequestId, list[int]], sizes: Mapping[RequestId, int], slips: float) -> None:
        self.answers, self.sizes, self.slips = answers, sizes, slips
        self.chance = random.Random(1)

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> dict[RequestId, Proposal]:
        found = {}
        for request_id, wanted in asked.items():
            done = len(wanted.token_ids) - self.sizes[request_id]
            drafts = self.answers[request_id][done : done + wanted.num_drafts]
            found[request_id] = Proposal(token_ids=tuple(d if self.chance.random() > self.slips else 2 + d % 200 for d in drafts))
        return {request_id: proposal for request_id, proposal in found.items() if proposal.token_ids}

    def forget(self, request_id: RequestId) -> None:
        pass


def answers(
    path: Path,
    topology: str,
    *,
    drafts: int | None,
    dtype: str = "float32",
    known: Answers | None = None,
    drafter: Mapping[str, Any] | None = None,
    **sections: Any,
) -> tuple[Answers, LocalCluster]:
    speculation = {} if drafts is None else {"speculation": {"maxDrafts": drafts, **(drafter or {})}}
    base: dict[str, Any] = {"cache": {"numBlocks": 96}, "scheduler": {"maxNumBatchedTokens": 64, "remotePrefillMinTokens": 4}}
    with LocalCluster(wiring(path, topology, dtype=dtype, **{**base, **sections}, **speculation), path) as cluster:
        if known is not None and drafts is not None:
            named = {RequestId(f"request-{i}"): answer for i, (answer, *_) in enumerate(known)}
            sizes = {RequestId(f"request-{i}"): len(prompt) for i, prompt in enumerate(prompts())}
            for part in cluster.generating:
                drafter = Knowing(named, sizes, 0.15)
                part.engine.scheduler.speculator = Speculator(drafter, max_drafts=drafts, clock=cluster.clock)
        ids = [
            cluster.submit(prompt, on=i % len(cluster.generating), prefill=0 if "pd" in topology else None, **request)
            for i, (prompt, request) in enumerate(zip(prompts(), REQUESTS, strict=True))
        ]
        cluster.run()
        found: Answers = []
        for request_id in ids:
            got = cluster.outputs[request_id]
            assert got.error is None, got.error
            stopped_by = None if got.last is None else got.last.stop_token_id
            logprobs = [(e.token_id, pytest.approx(e.logprob, abs=1e-4)) for e in got.logprobs]
            found.append((got.token_ids, logprobs, got.finish_reason, stopped_by))
        for part in (*cluster.generating, *cluster.prefilling):
            assert part.engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks
        return found, cluster


def taken(cluster: LocalCluster) -> int:
    speculators = [part.engine.scheduler.speculator for part in cluster.generating]
    return sum(speculator.stats.num_taken for speculator in speculators if speculator is not None)


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Answers:
    return answers(tiny, "monolith", drafts=None)[0]


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_answers_as_without_drafts(tiny: Path, plain: Answers, name: str) -> None:
    topology, counts = WIRINGS[name]
    for known, drafts in ((None, 3), (plain, 7)):
        found, cluster = answers(tiny, topology, drafts=drafts, known=known, **counts)
        assert found == plain
        assert taken(cluster) > (0 if known is None else 20)


def test_preempted_requests_answer_as_without_drafts(tiny: Path, plain: Answers) -> None:
    found, cluster = answers(tiny, "monolith", drafts=7, known=plain, cache={"numBlocks": 24, "blockSizeTokens": 4})
    assert cluster.generating[0].engine.scheduler.stats.num_preemptions > 0
    assert found == plain
    assert taken(cluster) > 20


def drafter_of(name: str, path: Path) -> dict[str, Any]:
    """The model itself as its draft model, which is taken always; or its first layer, which is taken now and then."""
    return {"drafter": name, "model": {"uri": str(path)}} if name == "model" else {"drafter": name, "layers": 1}


@pytest.mark.parametrize("name", ["model", "layers"])
@pytest.mark.parametrize("where", ["monolith", "2A3F", "P/D + AFD"])
def test_drafters_with_layers_of_their_own_change_no_token(tiny: Path, plain: Answers, name: str, where: str) -> None:
    topology, counts = WIRINGS[where]
    found, cluster = answers(tiny, topology, drafts=4, drafter=drafter_of(name, tiny), **counts)
    assert found == plain
    assert taken(cluster) > (60 if name == "model" else 2)
    for part in cluster.generating:
        assert part.engine.scheduler.speculator is not None
        drafter: Any = part.engine.scheduler.speculator.drafter
        assert drafter.sequences.num_free_blocks == cluster.facts.num_blocks, "what has ended holds no block"


@pytest.mark.parametrize("cache_tokens", [64, 400])
def test_a_draft_model_catches_up_after_preemption_and_where_its_own_cache_is_small(
    tiny: Path, plain: Answers, cache_tokens: int
) -> None:
    drafter = {**drafter_of("model", tiny), "cacheTokens": cache_tokens}
    cache = {"numBlocks": 24, "blockSizeTokens": 4}
    found, cluster = answers(tiny, "monolith", drafts=5, drafter=drafter, cache=cache)
    assert cluster.generating[0].engine.scheduler.stats.num_preemptions > 0
    assert found == plain
    assert taken(cluster) > 20


def test_a_mixture_of_experts_drafts_with_its_first_layer(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe")
    plain, _ = answers(path, "monolith", drafts=None)
    for topology, more in (("monolith", {}), ("afd", {"expert_groups": 2, "transport": {"numUbatches": 2}})):
        found, cluster = answers(path, topology, drafts=3, drafter=drafter_of("layers", path), **more)
        assert found == plain
        assert taken(cluster) > 0


def test_a_mixture_of_experts_answers_as_without_drafts(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe")
    plain, _ = answers(path, "monolith", drafts=None)
    for known in (None, plain):
        found, cluster = answers(path, "afd", drafts=5, known=known, expert_groups=2, transport={"numUbatches": 2})
        assert found == plain
        assert taken(cluster) > (0 if known is None else 20)


def test_the_context_and_the_answer_end_where_they_end_without_drafts(tiny: Path) -> None:
    prompt = [7, 8, 9] * 10
    ends = []
    for speculation in ({}, {"speculation": {"maxDrafts": 16}}):
        spec = wiring(tiny, "monolith", model={"uri": str(tiny), "maxModelLen": 64}, cache={"numBlocks": 32}, **speculation)
        with LocalCluster(spec, tiny) as cluster:
            ends.append([cluster.generate(prompt, max_tokens=length) for length in (1, 2, 3, 17, 500)])
            assert cluster.generating[0].engine.scheduler.blocks.num_free_blocks == 32
    assert ends[0] == ends[1]
    assert [len(tokens) for tokens in ends[1]] == [1, 2, 3, 17, 34]


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_a_lost_ffn_worker_and_a_lost_attention_worker_change_no_token(tiny: Path, plain: Answers, drafter: str) -> None:
    """An exchange's rows, drafts among them, are sent again to the other replica; what was emitted is gone on with elsewhere."""
    spec = wiring(
        tiny, "afd", attention=2, ffn_replicas=2, cache={"numBlocks": 96}, scheduler={"maxNumBatchedTokens": 64},
        speculation={"maxDrafts": 7, **(drafter_of(drafter, tiny) if drafter == "model" else {})},
    )  # fmt: skip
    with LocalCluster(spec, tiny) as cluster:
        compute, num_batches = cluster.ffns[0].halves.compute, 0

        def dies_in_the_middle(layer: int, rows: torch.Tensor) -> torch.Tensor:
            nonlocal num_batches
            num_batches += 1
            if num_batches == 17:
                for link in list(cluster.ffns[0].side._links):
                    link.close()
            return compute(layer, rows)

        cluster.ffns[0].halves.compute = dies_in_the_middle  # type: ignore[method-assign]
        first = [cluster.submit(p, on=0, **r) for p, r in zip(prompts(), REQUESTS, strict=True)]
        for _ in range(14):
            cluster.step()
        assert cluster.generating[0].worker.afd.times.num_resent > 0
        assert taken(cluster) > 0
        emitted = [list(cluster.outputs[request_id].token_ids) for request_id in first]
        unfinished = [i for i, request_id in enumerate(first) if cluster.outputs[request_id].finish_reason is None]
        cluster.generating[0].engine.scheduler.abort(first)
        second = {i: cluster.submit(prompts()[i], on=1, output=emitted[i], **REQUESTS[i]) for i in unfinished}
        cluster.run()
        for i in range(len(first)):
            assert emitted[i] + (cluster.outputs[second[i]].token_ids if i in second else []) == plain[i][0]
