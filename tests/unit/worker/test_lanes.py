"""Steps in lanes give every request what whole steps give it, whatever happens while several are in flight."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.core.request import FinishReason
from antiphon.models import head as head_module
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.testing import LocalCluster, wiring, write_tiny_llama, write_tiny_moe

PROMPTS = [[5 + number, 6, 7, 90 + number] for number in range(9)]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "seed": 7},
    {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5, "seed": 3},
    {"num_logprobs": 2},
    {"min_tokens": 4, "logit_bias": {17: 5.0}},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 384 tokens in several slices."""
    monkeypatch.setattr(head_module, "_SLICE", 64)


def made(checkpoint: Path, *, lanes: int = 3, **more: Any) -> LocalCluster:
    return LocalCluster(wiring(checkpoint, "afd", transport={"numUbatches": lanes}, **more), checkpoint)


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[LocalCluster]:
    with made(checkpoint) as built:
        yield built


def answers(cluster: LocalCluster, **more: Any) -> list[tuple[list[int], list[Any]]]:
    """Of all prompts at once, in ways that need all logits and ways that don't."""
    names = [
        cluster.submit(prompt, max_tokens=6 + 2 * number, **{**WAYS[number % len(WAYS)], **more})
        for number, prompt in enumerate(PROMPTS)
    ]
    cluster.run()
    return [(cluster.outputs[name].token_ids, list(cluster.outputs[name].logprobs)) for name in names]


def in_flight(cluster: LocalCluster) -> int:
    lanes = cluster.generating[0].worker.lanes
    assert lanes is not None
    return len(lanes.flying)


def fly(cluster: LocalCluster, wanted: int = 2) -> None:
    for _ in range(50):
        cluster.step()
        if in_flight(cluster) >= wanted:
            return
    raise AssertionError("no lanes")


@pytest.mark.parametrize("ffn", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_likelihoods_are_those_of_whole_steps(checkpoint: Path, ffn: int, dtype: str) -> None:
    found = []
    for lanes in (1, 2, 4):
        with made(checkpoint, lanes=lanes, ffn=ffn, dtype=dtype) as built:
            found.append(answers(built))
            assert (built.generating[0].worker.lanes is not None) == (lanes > 1)
            assert built.generating[0].engine.scheduler.blocks.num_free_blocks == built.facts.num_blocks
    assert found[0] == found[1] == found[2]


def test_several_are_in_flight_and_at_rest_nothing_is(cluster: LocalCluster) -> None:
    for prompt in PROMPTS:
        cluster.submit(prompt, max_tokens=20)
    fly(cluster, 2)
    cluster.run()
    assert in_flight(cluster) == 0
    assert cluster.generating[0].worker.afd.num_free_slots == 4, "three ubatches and one"


def test_aborts_and_newcomers_while_lanes_fly_change_nobody_elses_tokens(checkpoint: Path) -> None:
    with made(checkpoint, lanes=1) as built:
        expected = answers(built)
    chance = random.Random(3)
    with made(checkpoint) as built:
        names = []
        for number, prompt in enumerate(PROMPTS):
            names.append(built.submit(prompt, max_tokens=6 + 2 * number, **WAYS[number % len(WAYS)]))
            victim = built.submit([chance.randrange(300) for _ in range(20)], max_tokens=40)
            for _ in range(chance.randrange(6)):
                built.step()
            built.generating[0].engine.abort(victim)
        built.run()
        assert [(built.outputs[name].token_ids, list(built.outputs[name].logprobs)) for name in names] == expected
        assert built.generating[0].engine.scheduler.blocks.num_free_blocks == built.facts.num_blocks


def test_a_lost_ffn_worker_is_replaced_in_the_middle_of_lanes(checkpoint: Path) -> None:
    with made(checkpoint, ffn_replicas=2) as built:
        expected = answers(built)
    with made(checkpoint, ffn_replicas=2) as built:
        names = [
            built.submit(prompt, max_tokens=6 + 2 * number, **WAYS[number % len(WAYS)]) for number, prompt in enumerate(PROMPTS)
        ]
        fly(built)
        built.ffns[0].side.close()
        built.run()
        assert [(built.outputs[name].token_ids, list(built.outputs[name].logprobs)) for name in names] == expected
        assert len(built.generating[0].worker.afd.losses) == 1


def test_with_no_ffn_worker_left_the_requests_of_all_lanes_end_and_blocks_come_back(cluster: LocalCluster) -> None:
    names = [cluster.submit(prompt, max_tokens=30) for prompt in PROMPTS]
    fly(cluster)
    cluster.ffns[0].side.close()
    cluster.run()
    for name in names:
        error = cluster.outputs[name].error
        assert cluster.outputs[name].finish_reason is FinishReason.ERROR
        assert error is not None
        assert error.code == "peer_lost"
    assert cluster.generating[0].engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks


@pytest.mark.parametrize("where", ["begin", "attend", "combine"])
def test_a_fault_in_a_lane_costs_the_steps_in_flight_one_more_try(
    checkpoint: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    with made(checkpoint, lanes=1) as built:
        expected = answers(built)
    names = [cluster.submit(prompt, max_tokens=6 + 2 * n, **WAYS[n % len(WAYS)]) for n, prompt in enumerate(PROMPTS)]
    fly(cluster)
    halves = cluster.generating[0].worker.halves
    real, left = getattr(halves, where), [1]

    def fails_once(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("a kernel failed")
        return real(*args)

    monkeypatch.setattr(halves, where, fails_once)
    cluster.run()
    assert left == [0]
    assert len([record for record in caplog.records if "in lanes failed" in record.message]) == 1, "nothing falls after it"
    assert [(cluster.outputs[name].token_ids, list(cluster.outputs[name].logprobs)) for name in names] == expected


def test_a_request_that_no_step_can_compute_ends_alone(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [cluster.generate(prompt, max_tokens=12) for prompt in PROMPTS]
    names = [cluster.submit(prompt, max_tokens=12) for prompt in PROMPTS]
    fly(cluster)
    halves = cluster.generating[0].worker.halves
    begin, poisoned = halves.begin, cluster.generating[0].worker.rows[names[4]]

    def fails(token_ids: torch.Tensor, batch: Any) -> Any:
        if poisoned.block_ids[0] in batch.decode_blocks_BM[:, 0].tolist():
            raise IndexError("index out of range in self")
        return begin(token_ids, batch)

    monkeypatch.setattr(halves, "begin", fails)
    cluster.run()
    for number, name in enumerate(names):
        if number == 4:
            assert cluster.outputs[name].finish_reason is FinishReason.ERROR
        else:
            assert cluster.outputs[name].token_ids == expected[number]


def test_rows_that_are_no_numbers_end_their_request_alone(cluster: LocalCluster) -> None:
    expected = [cluster.generate(prompt, max_tokens=12) for prompt in PROMPTS]
    names = [cluster.submit(prompt, max_tokens=12) for prompt in PROMPTS]
    fly(cluster)
    part = cluster.generating[0]
    row = part.worker.rows[names[2]]
    slots = part.cache.slots(row.block_ids, 0, 2)
    for planes in part.cache.planes:
        for plane in planes:
            plane[slots] = float("nan")
    cluster.run()
    for number, name in enumerate(names):
        if number == 2:
            assert cluster.outputs[name].finish_reason is FinishReason.ERROR
            assert "non-finite" in str(cluster.outputs[name].error)
        else:
            assert cluster.outputs[name].token_ids == expected[number]


def test_a_new_placement_of_experts_is_taken_between_lanes(tmp_path: Path) -> None:
    path = write_tiny_moe(tmp_path)
    with made(path, lanes=1, expert_groups=2) as built:
        expected = answers(built)
    with made(path, expert_groups=2) as built:
        names = [built.submit(prompt, max_tokens=6 + 2 * n, **WAYS[n % len(WAYS)]) for n, prompt in enumerate(PROMPTS)]
        fly(built)
        worker = built.generating[0].worker
        load = {number: [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0] for number in range(built.facts.config.num_layers)}
        other = ExpertPlacement.balanced(built.facts.config, load, 2, 1)
        built.rebalance(other)
        assert not worker.has_switched, "rows of steps in flight may yet leave by the map before"
        for _ in range(8):
            built.step()
        assert worker.has_switched
        built.settle(other)
        built.run()
        # Sums over other workers round otherwise in the last bits, and no token hangs on them here.
        assert [built.outputs[name].token_ids for name in names] == [tokens for tokens, _ in expected]


def test_a_worker_that_joins_is_linked_though_lanes_never_rest(checkpoint: Path) -> None:
    with made(checkpoint) as built:
        for prompt in PROMPTS:
            built.submit(prompt, max_tokens=60)
        fly(built)
        side = built.generating[0].worker.afd
        built.connect_ffn(0, 0)
        assert side.has_arrivals
        for _ in range(8):
            built.step()
        assert not side.has_arrivals
        fly(built)
        built.run()
