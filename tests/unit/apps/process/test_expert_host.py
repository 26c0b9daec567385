"""One worker's phases of taking a placement in, and who moves experts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from antiphon.apps.process.expert_host import ExpertHost
from antiphon.apps.process.rebalancer import acting_of
from antiphon.core.errors import CheckpointInvalid, InvalidInput, Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.rpc.experts import PlaceStep, RebalanceWish
from antiphon.testing import LocalCluster, wiring, write_tiny_moe


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    path = write_tiny_moe(tmp_path / "model")
    with LocalCluster(wiring(path, "afd", expert_groups=2, cache={"numBlocks": 64}), path) as running:
        yield running


def host_of(cluster: LocalCluster, role: Role) -> tuple[ExpertHost, list[int]]:
    changes: list[int] = []
    is_ffn = role is Role.FFN
    host = ExpertHost(
        config=cluster.facts.config,
        role=role,
        worker_id="test",
        deployment="test",
        placement=cluster.facts.placement(2),
        ffn=cluster.ffns[0] if is_ffn else None,
        attention=None if is_ffn else cluster.generating[0].worker,
        changed=lambda: changes.append(1),
    )
    return host, changes


def step(cluster: LocalCluster, phase: str, number: int, placement: ExpertPlacement) -> PlaceStep:
    return PlaceStep(phase=phase, number=number, placement_json=placement.to_json(cluster.facts.config))


def swapped(cluster: LocalCluster) -> ExpertPlacement:
    """Groups 0 and 1 change places."""
    spread = ExpertPlacement.spread(cluster.facts.config, 2)
    return ExpertPlacement(num_groups=2, groups=tuple(tuple((1 - held[0],) for held in layer) for layer in spread.groups))


def hold(host: ExpertHost, asked: PlaceStep) -> None:
    deadline = time.monotonic() + 30
    while not host.take(asked):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_ffn_worker_holds_both_placements_and_then_the_new_one(cluster: LocalCluster) -> None:
    host, changes = host_of(cluster, Role.FFN)
    placement = swapped(cluster)
    hold(host, step(cluster, "HOLD", 1, placement))
    banks = cluster.ffns[0].halves.banks.values()
    assert all(bank.held == frozenset(range(8)) for bank in banks)
    assert host.number == 0
    assert host.take(step(cluster, "RELEASE", 1, placement))
    assert all(bank.held == frozenset(range(4, 8)) for bank in banks)
    assert (host.number, cluster.ffns[0].placement, changes) == (1, 1, [1])
    assert host.take(step(cluster, "RELEASE", 1, ExpertPlacement.spread(cluster.facts.config, 2))), "asked again: nothing changes"
    assert host.take(step(cluster, "HOLD", 1, ExpertPlacement.spread(cluster.facts.config, 2)))
    assert all(bank.held == frozenset(range(4, 8)) for bank in banks)


def test_an_attention_worker_uses_the_map_from_its_next_step_on(cluster: LocalCluster) -> None:
    host, changes = host_of(cluster, Role.ATTENTION)
    placement = swapped(cluster)
    assert host.take(step(cluster, "USE", 3, placement)), "it is between two steps"
    assert host.take(step(cluster, "USE", 2, ExpertPlacement.spread(cluster.facts.config, 2))), "an older one changes nothing"
    cluster.generate([1, 2, 3], max_tokens=2)
    used = cluster.generating[0].worker.afd.experts
    assert used is not None
    assert (used.number, used.placement) == (3, placement)
    assert (host.number, host.placement, changes) == (3, placement, [1])


def test_what_is_not_for_the_worker_is_refused(cluster: LocalCluster) -> None:
    host, _ = host_of(cluster, Role.FFN)
    with pytest.raises(InvalidInput, match="not for a worker of role ffn"):
        host.take(step(cluster, "USE", 1, swapped(cluster)))
    with pytest.raises(InvalidInput, match="3 groups, here are 2"):
        host.take(step(cluster, "HOLD", 1, ExpertPlacement.spread(cluster.facts.config, 3)))
    with pytest.raises(InvalidInput, match="not a placement file"):
        host.take(PlaceStep(phase="HOLD", number=1, placement_json="{}"))


def test_what_kept_a_worker_from_reading_is_told_and_may_be_tried_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = host_of(cluster, Role.FFN)

    def fail(_placement: ExpertPlacement, **_options: float) -> None:
        raise CheckpointInvalid("the disk is gone")

    monkeypatch.setattr(cluster.ffns[0].halves, "hold", fail)
    asked = step(cluster, "HOLD", 1, swapped(cluster))
    with pytest.raises(CheckpointInvalid, match="the disk is gone"):
        hold(host, asked)
    monkeypatch.undo()
    hold(host, asked)


async def test_only_who_moves_experts_takes_a_wish(cluster: LocalCluster) -> None:
    host, _ = host_of(cluster, Role.FFN)
    with pytest.raises(Unavailable, match="attention workers balance"):
        await host.rebalance(RebalanceWish(), {})


def test_the_ready_attention_worker_with_the_lowest_id_acts() -> None:
    def worker(name: str, role: Role, *, ready: bool = True, draining: bool = False) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(name),
            deployment="d",
            pool="p",
            role=role,
            model="m",
            revision="r",
            fingerprint="f",
            epoch=Epoch(1),
            endpoint=Endpoint(rpc="h:1"),
            pid=1,
            host="h",
            ready=ready,
            draining=draining,
        )

    a, f = Role.ATTENTION, Role.FFN
    workers = [worker("0", f), worker("1", a, ready=False), worker("2", a, draining=True), worker("4", a), worker("3", a)]
    acting = acting_of(workers)
    assert acting is not None
    assert acting.worker_id == "3"
    assert acting_of(workers[:3]) is None
