"""Decode steps of a worker that are replayed from recordings give the tokens of steps computed eagerly.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the CPU is taken for a card and a tape for its graphs; ``make test`` runs this file in
a process of its own.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.core.request import RequestId
from antiphon.models.decoder import FFNHalves
from antiphon.testing import Generated, LocalCluster, wiring, write_tiny_llama, write_tiny_moe

WRITERS: dict[str, Callable[[Path], object]] = {"dense": write_tiny_llama, "moe": write_tiny_moe}
WIRINGS = {"monolith": "monolith", "P/D": "pd"}
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7, "top_p": 0.9},
    {"num_logprobs": 3},
    {"temperature": 1.2, "seed": 3, "repetition_penalty": 1.3, "num_logprobs": 1},
    {"logit_bias": {5: 4.0}},
]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalCluster]]:
    """A cluster of a tiny model, recorded or eager."""
    made: list[LocalCluster] = []

    def start(kind: str, topology: str, *, graphs: bool, **sections: Any) -> LocalCluster:
        monkeypatch.setenv("ANTIPHON_GRAPHS", "1" if graphs else "0")
        if not (tmp_path / "config.json").exists():
            WRITERS[kind](tmp_path)
        sections["scheduler"] = {"maxNumSeqs": 12, **sections.get("scheduler", {})}
        spec = wiring(tmp_path, topology, **{"cache": {"numBlocks": 64, "blockSizeTokens": 4}, **sections})
        cluster = LocalCluster(spec, tmp_path)
        made.append(cluster)
        return cluster

    yield start
    for cluster in made:
        cluster.close()


def requests(cluster: LocalCluster, topology: str) -> dict[RequestId, Generated]:
    """Prompts of many lengths that come and go while others run, each sampled in its own way."""
    chance = random.Random(4)
    for n in range(11):
        prompt = [chance.randrange(90) for _ in range(1 + 5 * n % 37)]
        prefill = 0 if topology == "pd" and n % 2 else None
        cluster.submit(prompt, max_tokens=3 + 4 * n % 21, prefill=prefill, request_id=f"r{n}", **SAMPLINGS[n % len(SAMPLINGS)])
        for _ in range(n % 4):
            cluster.step()
    cluster.run()
    return cluster.outputs


@pytest.mark.parametrize("topology", WIRINGS.values(), ids=WIRINGS)
@pytest.mark.parametrize("kind", WRITERS)
def test_replayed_steps_give_the_tokens_of_eager_ones(kind: str, topology: str, make: Callable[..., LocalCluster]) -> None:
    sections = {"scheduler": {"remotePrefillMinTokens": 4, "maxNumBatchedTokens": 32}}
    eager = requests(make(kind, topology, graphs=False, **sections), topology)
    cluster = make(kind, topology, graphs=True, **sections)
    replayed = requests(cluster, topology)
    graphs = cluster.generating[0].worker.graphs
    assert graphs is not None
    assert graphs.num_replays > 20
    for name, expected in eager.items():
        assert replayed[name].error is None
        assert replayed[name].token_ids == expected.token_ids
        for ours, theirs in zip(replayed[name].logprobs, expected.logprobs, strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    blocks = cluster.generating[0].engine.scheduler.blocks
    assert blocks.num_free_blocks == cluster.facts.num_blocks


def test_preempted_requests_and_wrong_drafts_leave_no_old_block_in_a_table(make: Callable[..., LocalCluster]) -> None:
    def run(cluster: LocalCluster) -> list[list[int]]:
        for n in range(6):  # twelve blocks for six requests that want four each
            cluster.submit([n, n + 1, n, n + 1, n, n + 1], max_tokens=10, request_id=f"r{n}")
        cluster.run()
        return [cluster.outputs[RequestId(f"r{n}")].token_ids for n in range(6)]

    sections: dict[str, Any] = {"cache": {"numBlocks": 12, "blockSizeTokens": 4}, "model": {"maxModelLen": 24}}
    eager = run(make("dense", "monolith", graphs=False, **sections))
    guessing = make("dense", "monolith", graphs=True, speculation={"drafter": "ngram"}, **sections)
    assert run(guessing) == eager
    scheduler = guessing.generating[0].engine.scheduler
    assert scheduler.stats.num_preemptions > 0
    graphs = guessing.generating[0].worker.graphs
    assert graphs is not None
    assert graphs.num_replays > 0


def test_a_batch_beyond_every_recording_is_computed_eagerly(make: Callable[..., LocalCluster]) -> None:
    limits = {"maxNumSeqs": 300, "maxQueuedRequests": 300}
    cluster = make("dense", "monolith", graphs=True, scheduler=limits, cache={"numBlocks": 1200, "blockSizeTokens": 4})
    for n in range(270):
        cluster.submit([n % 90], max_tokens=4, request_id=f"r{n}")
    cluster.run()
    assert cluster.generating[0].worker.graphs is not None
    assert cluster.generating[0].worker.graphs.num_replays == 0
    alone = make("dense", "monolith", graphs=False)
    for n in (0, 89, 255, 269):
        assert cluster.outputs[RequestId(f"r{n}")].token_ids == alone.generate([n % 90], max_tokens=4, request_id=f"alone {n}")


def test_a_row_that_is_not_finite_ends_its_request_alone(make: Callable[..., LocalCluster]) -> None:
    cluster = make("moe", "monolith", graphs=True)
    good = cluster.submit([1, 2, 3], max_tokens=12, request_id="good")
    bad = cluster.submit([4, 5, 6], max_tokens=12, request_id="bad")
    for _ in range(4):
        cluster.step()
    worker = cluster.generating[0].worker
    row = worker.rows[bad]
    with torch.inference_mode():  # what a fault of the memory would leave
        worker.cache.planes[0][0][row.block_ids[0] * worker.cache.layout.block_size_tokens] = float("nan")
    cluster.run()
    error = cluster.outputs[bad].error
    assert error is not None
    assert "non-finite" in error.message
    alone = make("moe", "monolith", graphs=False)
    assert cluster.outputs[good].token_ids == alone.generate([1, 2, 3], max_tokens=12)


def test_a_model_that_asks_the_host_is_served_eagerly_and_the_log_says_so(
    make: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = FFNHalves.compute

    def asking(self: FFNHalves, number: int, rows_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert bool((rows_TD.abs().sum() >= 0).item())
        return compute(self, number, rows_TD, *rest)

    monkeypatch.setattr(FFNHalves, "compute", asking)
    with caplog.at_level(logging.WARNING):
        cluster = make("dense", "monolith", graphs=True)
    assert "asks the host" in caplog.text
    assert len(cluster.generate([1, 2, 3], max_tokens=5)) == 5
