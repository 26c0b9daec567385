"""A fault in computing one request ends that request alone; one of the worker itself ends the worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from antiphon.core.request import FinishReason
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

POISON = 77


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["monolith", "afd"])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LocalCluster]:
    with LocalCluster(wiring(checkpoint, request.param), checkpoint) as made:
        yield made


def test_others_of_the_batch_get_the_tokens_they_get_without_it(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5, 6, 7, number] for number in range(5)]
    expected = [cluster.generate(prompt, max_tokens=6) for prompt in prompts]
    worker = cluster.generating[0].worker
    begin = worker.halves.begin

    def fails_on_poison(token_ids: torch.Tensor, *rest: object) -> object:
        if POISON in token_ids.tolist():
            raise IndexError("index out of range in self")
        return begin(token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.halves, "begin", fails_on_poison)
    cluster.submit([1, POISON, 2], request_id="poison", max_tokens=6)
    names = [cluster.submit(prompt, max_tokens=6) for prompt in prompts]
    cluster.run()
    assert cluster.outputs["poison"].finish_reason is FinishReason.ERROR  # type: ignore[index]
    assert str(cluster.outputs["poison"].error) == "internal_error: IndexError"  # type: ignore[index]
    assert [cluster.outputs[name].token_ids for name in names] == expected
    blocks = cluster.generating[0].engine.scheduler.blocks
    assert blocks.num_free_blocks == blocks.num_blocks


def test_a_fault_behind_the_exchange_ends_the_rows_it_met_and_the_worker_goes_on(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cluster.generate([3, 4, 5], max_tokens=4)
    ffn = cluster.ffns[0] if cluster.ffns else cluster.generating[0].ffn
    assert ffn is not None
    compute, left = ffn.halves.compute, [1]

    def fails_once(*args: object) -> object:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("a kernel failed")
        return compute(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ffn.halves, "compute", fails_once)
    name = cluster.submit([3, 4, 5], max_tokens=4)
    cluster.run()
    assert cluster.outputs[name].finish_reason is FinishReason.ERROR
    assert ffn.stats.num_faults == 1
    assert cluster.generate([3, 4, 5], max_tokens=4) == expected


def test_a_worker_at_which_every_request_fails_ends_so_that_another_is_started(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(cluster.generating[0].worker.halves, "begin", broken)
    for number in range(20):
        cluster.submit([number + 1, 2, 3])
    with pytest.raises(RuntimeError, match="the device is gone"):
        cluster.run()


def test_a_request_that_can_not_be_set_up_ends_alone(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cluster.generate([8, 9], max_tokens=3)
    from antiphon.worker import request_row

    made = request_row.SamplingState

    def fails(params: object, *rest: object, **more: object) -> object:
        if getattr(params, "seed", 0) == 666:
            raise IndexError("no such token")
        return made(params, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(request_row, "SamplingState", fails)
    cluster.submit([1, 2], request_id="bad", seed=666)
    name = cluster.submit([8, 9], max_tokens=3)
    cluster.run()
    assert str(cluster.outputs["bad"].error) == "internal_error: IndexError"  # type: ignore[index]
    assert cluster.outputs[name].token_ids == expected


def test_a_worker_whose_ffn_does_not_answer_says_so(checkpoint: Path) -> None:
    with LocalCluster(wiring(checkpoint, "afd"), checkpoint) as made:
        side = made.generating[0].worker.afd
        now = [100.0]
        side._clock = lambda: now[0]
        assert side.waits_s == 0.0
        made.generate([1, 2, 3], max_tokens=1)  # links are taken up
        side.send(1, 0, 0, torch.zeros(1, made.facts.config.hidden_size))
        now[0] += 3.0
        assert side.waits_s == pytest.approx(3.0)
        side.abandon()
        assert side.waits_s == 0.0
