"""Attention and FFN workers on cards replay their halves between exchanges: the tokens of eager steps, also when a worker is lost.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the CPU is taken for a card and a tape for its graphs; ``make test`` runs this file in
a process of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.apps.process.wiring import build
from antiphon.core.request import RequestId
from antiphon.device.graphs import TapeGraphs
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.testing import Generated, LocalCluster, wiring, write_tiny_llama, write_tiny_moe
from antiphon.worker.cards.split_graphs import SplitGraphs

WRITERS: dict[str, Callable[[Path], object]] = {"dense": write_tiny_llama, "moe": write_tiny_moe}
WIRINGS: dict[str, dict[str, Any]] = {
    "1A1F": {"transport": {"numUbatches": 1}},
    "1A1F, two ubatches": {"transport": {"numUbatches": 2}},
    "2A1F, two ubatches": {"attention": 2, "transport": {"numUbatches": 2}},
    "1A2F": {"ffn": 2, "transport": {"numUbatches": 2}},
}
SAMPLINGS: list[dict[str, Any]] = [{"num_logprobs": 2}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}, {}]
Make = Callable[..., LocalCluster]


@dataclasses.dataclass
class Again:
    """One of ``RunAgain``'s."""

    run: Callable[[], Any]
    result: Any

    def replay(self) -> None:
        with torch.inference_mode():
            for new, old in zip(tensors(self.run()), tensors(self.result), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class RunAgain:
    """Graphs that record nothing: a replay is the same Python again, on rows of the same number, into the same memory."""

    def record(self, run: Callable[[], Any]) -> tuple[Again, Any]:
        result = run()
        return Again(run, result), result


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, list | tuple) else []


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A cluster of a tiny model whose halves are apart: eager, recorded, or with ``RunAgain`` for recordings."""
    made: list[LocalCluster] = []
    made_graphs = build._graphs

    def start(kind: str, graphs: object, **sections: Any) -> LocalCluster:
        monkeypatch.setenv("ANTIPHON_GRAPHS", "0" if graphs is None else "1")
        monkeypatch.setattr(build, "_graphs", (lambda _facts: RunAgain()) if graphs is RunAgain else made_graphs)
        if not (tmp_path / "config.json").exists():
            WRITERS[kind](tmp_path)
        sections = {"scheduler": {"maxNumSeqs": 12}, "cache": {"numBlocks": 64, "blockSizeTokens": 4}, **sections}
        cluster = LocalCluster(wiring(tmp_path, "afd", **sections), tmp_path)
        made.append(cluster)
        return cluster

    yield start
    for cluster in made:
        cluster.close()


def requests(cluster: LocalCluster) -> dict[RequestId, Generated]:
    """Prompts of many lengths that come and go while others run."""
    chance = random.Random(4)
    for n in range(9):
        prompt = [chance.randrange(90) for _ in range(1 + 5 * n % 37)]
        on = n % len(cluster.generating)
        cluster.submit(prompt, max_tokens=3 + 4 * n % 13, request_id=f"r{n}", on=on, **SAMPLINGS[n % len(SAMPLINGS)])
        for _ in range(n % 4):
            cluster.step()
    cluster.run()
    return cluster.outputs


def split_graphs(cluster: LocalCluster, index: int = 0) -> SplitGraphs:
    found = cluster.generating[index].worker._layers.graphs
    assert found is not None
    return found


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("kind", WRITERS)
def test_replayed_halves_give_what_eager_ones_give(kind: str, name: str, make: Make) -> None:
    eager = requests(make(kind, None, **WIRINGS[name]))
    again = requests(make(kind, RunAgain, **WIRINGS[name]))
    cluster = make(kind, TapeGraphs, **WIRINGS[name])
    replayed = requests(cluster)
    for index in range(len(cluster.generating)):
        assert split_graphs(cluster, index).num_replays > 20
    for ffn in cluster.ffns:
        assert ffn.graphs is not None
        assert ffn.graphs.num_replays > 20
    for request, expected in eager.items():
        assert replayed[request].error is None
        assert replayed[request].token_ids == expected.token_ids
        assert replayed[request].logprobs == again[request].logprobs  # bit for bit, where the numbers of rows are the same
        assert replayed[request].token_ids == again[request].token_ids
    for part in cluster.generating:
        assert part.engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks


@pytest.mark.parametrize(("kind", "after"), [("dense", 0), ("dense", 21), ("moe", 8)])
def test_an_ffn_worker_lost_within_a_replayed_step_costs_no_token(kind: str, after: int, make: Make) -> None:
    sections: dict[str, Any] = {"ffn_replicas": 2, "transport": {"numUbatches": 2}}
    expected = {name: got.token_ids for name, got in requests(make(kind, TapeGraphs, **sections)).items()}
    cluster = make(kind, TapeGraphs, **sections)
    used, answered = cluster.ffns[0], 0
    assert used.graphs is not None
    compute = used.graphs.compute

    def dies(*arguments: Any) -> torch.Tensor | None:
        nonlocal answered
        if answered == after:
            for link in list(used.side._links):
                link.close()
        answered += 1
        return compute(*arguments)

    used.graphs.compute = dies  # type: ignore[method-assign, assignment]
    assert {name: got.token_ids for name, got in requests(cluster).items()} == expected
    assert cluster.generating[0].worker.afd.times.num_resent > 0
    assert cluster.ffns[1].graphs is not None
    assert cluster.ffns[1].graphs.num_replays > 0


def test_experts_that_move_in_are_computed_eagerly_and_right(make: Make) -> None:
    expected = {name: got.token_ids for name, got in requests(make("moe", None)).items()}
    cluster = make("moe", TapeGraphs)
    for number, bank in cluster.ffns[0].halves.banks.items():
        if number == 0:
            bank.release(3)  # rows bring it back into its free slot: recordings stay true
    bank = cluster.ffns[0].halves.banks[1]
    bank._experts.num_moves += 1  # type: ignore[union-attr]
    graphs = cluster.ffns[0].graphs
    assert graphs is not None
    assert {name: got.token_ids for name, got in requests(cluster).items()} == expected
    assert cluster.ffns[0].halves.banks[0].num_late_loads == 1
    assert 0 < graphs.num_replays < cluster.ffns[0].stats.num_batches / 2 + 1


def test_a_row_that_is_not_finite_ends_its_request_alone(make: Make) -> None:
    cluster = make("moe", TapeGraphs)
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
    assert "the gate of" in error.message
    assert cluster.outputs[good].token_ids == make("moe", TapeGraphs).generate([1, 2, 3], max_tokens=12)


@pytest.mark.parametrize(("where", "method"), [(AttentionHalves, "attend"), (FFNHalves, "compute")])
def test_a_half_that_asks_the_host_is_computed_eagerly_and_the_log_says_so(
    where: Any, method: str, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = getattr(where, method)

    def asking(*arguments: Any) -> Any:
        assert bool((torch.ones(1) >= 0).all().item())
        return real(*arguments)

    monkeypatch.setattr(where, method, asking)
    with caplog.at_level(logging.WARNING):
        cluster = make("dense", TapeGraphs)
    assert "asks the host" in caplog.text
    assert len(cluster.generate([1, 2, 3], max_tokens=5)) == 5
