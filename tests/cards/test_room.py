"""KV blocks are counted from what a card has left beside weights and the largest step; what does not fit is refused by its field.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the CPU is taken for a card; the card's memory figures are given (``fake_card``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_card import FakeCard

from antiphon.apps.process.wiring.build import AttentionPart, build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.device.device import Device
from antiphon.device.memory import CardMemory
from antiphon.testing import wiring, write_tiny_llama, write_tiny_moe

MIB = 1 << 20
FIELD = "spec.pools[0].resources.gpuMemoryUtilization"
GRAIN = 4 * 2 * MIB  # two planes of two layers
Build = Callable[..., AttentionPart]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    made: list[AttentionPart] = []

    def start(card: FakeCard, share: float, *, kind: str = "dense", role: Role = Role.MONOLITH, **sections: Any) -> AttentionPart:
        if not (tmp_path / "config.json").exists():
            (write_tiny_llama if kind == "dense" else write_tiny_moe)(tmp_path)
        topology = {Role.MONOLITH: "monolith", Role.ATTENTION: "afd", Role.FFN: "afd", Role.DECODE: "pd", Role.PREFILL: "pd"}[role]
        spec = wiring(tmp_path, topology, **{"scheduler": {"maxNumSeqs": 8, "maxNumBatchedTokens": 128}, **sections})
        where = torch.device("cpu")
        card.answer(monkeypatch)
        with card:
            facts = resolve_model(
                spec, str(tmp_path), "test", Device(torch=where, memory=CardMemory(device=where, share=share, field=FIELD))
            )
            assert facts.num_blocks is None
            if role is Role.FFN:
                build_ffn(facts, FFNShard(), Epoch(1))
            part = build_attention(facts, spec, role, WorkerId("test"), Epoch(1), lambda _outputs: None, time.monotonic)
        made.append(part)
        return part

    yield start
    for part in made:
        part.close()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("role", [Role.MONOLITH, Role.ATTENTION, Role.DECODE, Role.PREFILL])
def test_blocks_fill_the_share_and_nothing_beyond(build: Build, kind: str, role: Role) -> None:
    card = FakeCard(total=100 * MIB)
    part = build(card, 0.5, kind=kind, role=role)
    assert part.facts.num_blocks == part.engine.scheduler.blocks.num_blocks
    budget = 50 * MIB
    cache_bytes = part.facts.num_blocks * part.facts.kv.block_bytes
    assert card.held <= budget
    assert card.held + GRAIN + MIB > budget - 4 * MIB  # the largest step's part is free again
    assert cache_bytes > 30 * MIB
    assert part.facts.max_model_len == 1024  # the model's own: nothing cuts it


def test_a_larger_step_leaves_fewer_blocks(build: Build) -> None:
    def blocks(tokens: int, seqs: int) -> int:
        part = build(FakeCard(total=100 * MIB), 0.5, scheduler={"maxNumSeqs": seqs, "maxNumBatchedTokens": tokens})
        assert part.facts.num_blocks is not None
        return part.facts.num_blocks

    few = blocks(64, 8)
    assert blocks(512, 8) < few
    assert blocks(64, 16) < few  # logits of more rows, and recordings for more


def test_a_stated_memory_is_taken_where_it_fits(build: Build) -> None:
    part = build(FakeCard(total=100 * MIB), 0.5, cache={"memory": "4Mi"})
    assert part.facts.num_blocks == 4 * MIB // part.facts.kv.block_bytes
    assert build(FakeCard(total=100 * MIB), 0.5, cache={"numBlocks": 70}).facts.num_blocks == 70


@pytest.mark.parametrize(
    ("share", "sections", "field", "says"),
    [
        (0.5, {"cache": {"memory": "48Mi"}}, "spec.cache.memory", "48Mi is more than the 0.0"),
        (0.5, {"cache": {"numBlocks": 100_000}}, "spec.cache.numBlocks", "100000 blocks take"),
        (0.02, {"cache": {"numBlocks": 64}}, FIELD, "is left for KV blocks"),
        (0.089, {"model": {"maxModelLen": 1000}}, "spec.model.maxModelLen", "one sequence of 1000 tokens does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(
    build: Build, share: float, sections: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        build(FakeCard(total=100 * MIB), share, **sections)
    assert refused.value.field == field
    assert "largest step" in str(refused.value)


def test_a_context_that_nobody_asked_for_is_cut_to_what_the_card_holds(build: Build) -> None:
    part = build(FakeCard(total=100 * MIB), 0.089)
    assert part.facts.num_blocks is not None
    assert part.facts.max_model_len == part.facts.num_blocks * part.facts.kv.block_size_tokens < 1024
    assert part.engine.scheduler.config.max_model_len == part.facts.max_model_len


@pytest.mark.parametrize("role", [Role.MONOLITH, Role.FFN])
def test_weights_beyond_the_share_are_refused_by_its_field(build: Build, role: Role) -> None:
    with pytest.raises(InvalidInput, match="weights and one step do not fit") as refused:
        build(FakeCard(total=100 * MIB, budget=MIB // 16), 0.5, role=role)
    assert refused.value.field == FIELD


def test_two_workers_on_one_card_have_their_shares_whoever_starts_first(build: Build) -> None:
    """Each counts by its own share of the whole card: what the other holds at that moment changes nothing."""
    alone = build(FakeCard(total=100 * MIB), 0.45, role=Role.ATTENTION).facts.num_blocks
    beside = build(FakeCard(total=100 * MIB, others=45 * MIB), 0.45, role=Role.ATTENTION).facts.num_blocks
    assert alone == beside


def test_a_share_that_others_hold_is_refused_with_what_can_be_had(build: Build) -> None:
    with pytest.raises(InvalidInput, match=r"other workers and the driver hold 0\.06 GiB: at most 0\.40 can be had") as refused:
        build(FakeCard(total=100 * MIB, others=60 * MIB), 0.45)
    assert refused.value.field == FIELD
