"""Steps that are launched before the tokens of those before them are known give the tokens of steps that are waited for.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the CPU is taken for a card and a tape for its graphs. The stand-in for a card's stream
does what it is asked for as late as a card may: not before somebody waits for it, and host memory is read then and not sooner.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.apps.process.wiring import build
from antiphon.core.request import RequestId
from antiphon.device.ready import Ready
from antiphon.testing import CARD_VARIABLE, Generated, LocalCluster, wiring, write_tiny_llama, write_tiny_moe

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7, "top_p": 0.9},
    {"temperature": 1.1, "seed": 2**63 + 5, "top_k": 9},
    {"temperature": 1.3, "seed": 11, "min_p": 0.05},
    {"temperature": 0.8, "seed": 5},
]
ON_HOST: list[dict[str, Any]] = [
    {"num_logprobs": 2},
    {"temperature": 1.2, "seed": 3, "repetition_penalty": 1.3},
    {"logit_bias": {5: 4.0}},
    {"min_tokens": 6, "stop_token_ids": frozenset(range(0, 384, 2))},
]


class LateStream:
    """Does nothing before it is waited for."""

    def __init__(self, _device: torch.device) -> None:
        self._asked: deque[Callable[[], object]] = deque()
        self._num_asked = self._num_done = 0

    def do(self, work: Callable[[], object]) -> None:
        self._asked.append(work)
        self._num_asked += 1

    def mark(self) -> Ready:
        stream, until = self, self._num_asked

        class Reached:
            def wait(self, timeout_s: float) -> bool:
                with torch.inference_mode():
                    while stream._num_done < until:
                        stream._num_done += 1
                        stream._asked.popleft()()
                return True

        return Reached()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalCluster]]:
    made: list[LocalCluster] = []
    if os.environ.get(CARD_VARIABLE) != "1":  # a card is late by itself
        monkeypatch.setattr(build, "CurrentStream", LateStream)

    def start(*, overlap: bool, kind: str = "dense", topology: str = "monolith", **sections: Any) -> LocalCluster:
        monkeypatch.setenv("ANTIPHON_OVERLAP", "1" if overlap else "0")
        if not (tmp_path / "config.json").exists():
            (write_tiny_llama if kind == "dense" else write_tiny_moe)(tmp_path)
        sections["scheduler"] = {"maxNumSeqs": 8, **sections.get("scheduler", {})}
        spec = wiring(tmp_path, topology, **{"cache": {"numBlocks": 64, "blockSizeTokens": 4}, **sections})
        made.append(LocalCluster(spec, tmp_path))
        return made[-1]

    yield start
    for cluster in made:
        cluster.close()


def num_ahead(cluster: LocalCluster) -> int:
    overlap = cluster.generating[0].worker.overlap
    assert overlap is not None
    return overlap.num_ahead


def all_free(cluster: LocalCluster) -> bool:
    return cluster.generating[0].engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks


def said(outputs: dict[RequestId, Generated]) -> dict[str, tuple[list[int], object]]:
    return {name: (got.token_ids, got.finish_reason) for name, got in outputs.items()}


def sure(outputs: dict[RequestId, Generated]) -> dict[str, list[float]]:
    """Log probabilities of tokens, and of the likeliest beside them."""
    return {
        name: [lp for one in got.logprobs for lp in (one.logprob, *(top for _, top in one.top))] for name, got in outputs.items()
    }


def traffic(cluster: LocalCluster, samplings: list[dict[str, Any]], topology: str = "monolith", gap: int = 9) -> None:
    """Requests that join and leave while others run, some by a stop token."""
    chance = random.Random(4)
    for n in range(10):
        prompt = [chance.randrange(90) for _ in range(1 + 5 * n % 23)]
        options = {"eos": range(0, 384, 7) if n % 3 == 0 else (), "prefill": 0 if topology == "pd" and n % 2 else None}
        cluster.submit(prompt, max_tokens=5 + 7 * n % 31, request_id=f"r{n}", **options, **samplings[n % len(samplings)])
        for _ in range(n % gap):
            cluster.step()
    cluster.run()


@pytest.mark.parametrize(("kind", "topology"), [("dense", "monolith"), ("moe", "monolith"), ("dense", "pd")])
def test_overlapped_steps_give_the_tokens_of_steps_in_turn(make: Callable[..., LocalCluster], kind: str, topology: str) -> None:
    sections = {"scheduler": {"remotePrefillMinTokens": 4, "maxNumBatchedTokens": 32}}
    plain, ahead = (make(overlap=overlap, kind=kind, topology=topology, **sections) for overlap in (False, True))
    for cluster in (plain, ahead):
        traffic(cluster, SAMPLINGS, topology)
    assert said(ahead.outputs) == said(plain.outputs)
    assert num_ahead(ahead) > 20
    assert num_ahead(plain) == 0
    assert all_free(ahead)


def test_requests_that_need_the_host_make_their_steps_wait_and_change_nothing(make: Callable[..., LocalCluster]) -> None:
    plain, ahead = (make(overlap=overlap) for overlap in (False, True))
    for cluster in (plain, ahead):
        traffic(cluster, [*SAMPLINGS, *ON_HOST])
    assert said(ahead.outputs) == said(plain.outputs)
    for name, logprobs in sure(ahead.outputs).items():  # other numbers of rows at once may round otherwise
        assert logprobs == pytest.approx(sure(plain.outputs)[name], abs=1e-5)
    assert num_ahead(ahead) > 0


def test_a_stop_token_found_one_step_late_costs_a_token_that_nobody_sees(make: Callable[..., LocalCluster]) -> None:
    plain, ahead = (make(overlap=overlap, cache={"numBlocks": 16, "blockSizeTokens": 4}) for overlap in (False, True))
    expected = plain.generate([1, 2, 3], max_tokens=20)
    eos = expected[6]
    assert eos not in expected[:6]
    scheduler = ahead.generating[0].engine.scheduler
    name = ahead.submit([1, 2, 3], max_tokens=20, eos=[eos])
    while ahead.outputs[name].finish_reason is None:
        ahead.step()
    assert ahead.outputs[name].token_ids == expected[:7]
    assert not scheduler.num_running
    assert scheduler.blocks.num_free_blocks < 16  # the step behind is being computed, and writes there
    ahead.step()
    assert scheduler.blocks.num_free_blocks == 16
    assert ahead.outputs[name].token_ids == expected[:7]
    assert ahead.generate([1, 2, 3], max_tokens=20) == expected  # from the prefix cache, too


def test_preemption_and_wrong_drafts(make: Callable[..., LocalCluster]) -> None:
    def run(cluster: LocalCluster) -> dict[str, tuple[list[int], object]]:
        for n in range(6):  # twelve blocks for six requests that want four each
            cluster.submit([n, n + 1, n, n + 1, n, n + 1], max_tokens=10, request_id=f"r{n}", speculates=n % 2 == 0)
        cluster.run()
        return said(cluster.outputs)

    sections: dict[str, Any] = {"cache": {"numBlocks": 12, "blockSizeTokens": 4}, "model": {"maxModelLen": 24}}
    expected = run(make(overlap=False, **sections))
    ahead, guessing = make(overlap=True, **sections), make(overlap=True, speculation={"drafter": "ngram"}, **sections)
    assert run(ahead) == expected
    assert run(guessing) == expected
    assert ahead.generating[0].engine.scheduler.stats.num_preemptions > 0
    assert num_ahead(ahead) > 0
    assert all_free(ahead)
    assert all_free(guessing)


@pytest.mark.parametrize("moment", range(3, 8))
def test_an_abort_at_any_moment_takes_nothing_from_others(make: Callable[..., LocalCluster], moment: int) -> None:
    ahead = make(overlap=True)
    expected = ahead.generate([5, 6, 7], max_tokens=14)
    kept = ahead.submit([5, 6, 7], max_tokens=14, request_id="kept")
    gone = ahead.submit([9, 8], max_tokens=14, request_id="gone", temperature=1.0, seed=1)
    for _ in range(moment):
        ahead.step()
    ahead.generating[0].engine.abort(gone)
    again = ahead.submit([5, 6, 7, 1, 2], max_tokens=5, request_id="next")
    ahead.run()
    assert ahead.outputs[kept].token_ids == expected
    assert len(ahead.outputs[again].token_ids) == 5
    assert len(ahead.outputs[gone].token_ids) < 14
    assert all_free(ahead)


def test_a_row_that_is_not_finite_ends_its_request_alone_and_leaves_numbers(make: Callable[..., LocalCluster]) -> None:
    cluster = make(overlap=True, kind="moe")
    expected = cluster.generate([1, 2, 3], max_tokens=12)
    good = cluster.submit([1, 2, 3], max_tokens=12, request_id="good")
    bad = cluster.submit([4, 5, 6], max_tokens=12, request_id="bad")
    for _ in range(5):
        cluster.step()
    worker = cluster.generating[0].worker
    first = worker.rows[bad].block_ids[0] * 4
    with torch.inference_mode():  # what a fault of the memory would leave
        worker.cache.planes[0][0][first] = float("nan")
    cluster.run()
    error = cluster.outputs[bad].error
    assert error is not None
    assert "non-finite" in error.message
    assert cluster.outputs[good].token_ids == expected
    with torch.inference_mode():
        worker.cache.planes[0][0][first] = 0.0
    assert all(bool(torch.isfinite(plane).all()) for planes in worker.cache.planes for plane in planes)
    assert all_free(cluster)


def test_a_step_that_cannot_be_launched_is_executed(make: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead = (make(overlap=overlap) for overlap in (False, True))
    graphs = ahead.generating[0].worker.graphs
    assert graphs is not None
    launch, calls = graphs.launch, 0

    def fails_at_times(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 4:
            raise RuntimeError("no")
        return launch(*arguments)

    monkeypatch.setattr(graphs, "launch", fails_at_times)
    for cluster in (plain, ahead):
        traffic(cluster, SAMPLINGS)
    assert said(ahead.outputs) == said(plain.outputs)
