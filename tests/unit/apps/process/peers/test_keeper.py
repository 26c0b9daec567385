"""How often a worker asks the directory for its peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from antiphon.apps.process.peers import keeper
from antiphon.apps.process.peers.keeper import CALM_TURNS, PeerKeeper, PeerWish
from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import PeerLost
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo


class _Debtors:
    def owing(self) -> dict[Any, float]:
        return {}


class World:
    """A directory, the links to who is in it, and turns that a test takes."""

    def __init__(self) -> None:
        self.records: list[WorkerInfo] = []
        self.linked: set[tuple[WorkerId, Epoch]] = set()
        self.refuses = False
        self.num_looks = 0

    def workers(self, _deployment: str) -> list[WorkerRecord]:
        self.num_looks += 1
        return [WorkerRecord(info=info, age_s=0.0, lease_s=5.0) for info in self.records]

    def connect(self, *_args: Any) -> Any:
        if self.refuses:
            raise PeerLost("ffn", "it does not answer")
        return object()

    def enter(self, name: str, epoch: int = 1) -> None:
        self.records = [each for each in self.records if each.worker_id != name]
        endpoint = Endpoint(rpc=f"{name}:1", data=f"grpc://{name}:2")
        info = WorkerInfo(
            worker_id=WorkerId(name),
            deployment="d",
            pool="ffn",
            role=Role.FFN,
            fingerprint="f",
            host="h",
            epoch=Epoch(epoch),
            model="m",
            revision="r",
            endpoint=endpoint,
            pid=1,
            ready=True,
        )
        self.records.append(info)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def peers(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerKeeper]:
    monkeypatch.setattr(keeper, "INTERVAL_S", 3600.0)
    wish = PeerWish(
        role=Role.FFN,
        hello=lambda _info: None,  # type: ignore[arg-type,return-value]
        linked=lambda: set(world.linked),
        add_link=lambda info, _link: world.linked.add((info.worker_id, info.epoch)),
        creditor=_Debtors(),  # type: ignore[arg-type]
    )
    made = PeerKeeper(world, "d", "r", [wish], world.connect)  # type: ignore[arg-type]
    yield made
    made.close()


def looks(world: World, peers: PeerKeeper, num_turns: int) -> int:
    before = world.num_looks
    for _ in range(num_turns):
        peers._turn()
    return world.num_looks - before


def test_who_has_all_peers_looks_seldom(world: World, peers: PeerKeeper) -> None:
    world.enter("a")
    assert looks(world, peers, 2) == 2  # the first finds it, the second sees that nobody is missing
    assert looks(world, peers, 10 * CALM_TURNS) == 10


def test_who_waits_for_a_peer_looks_every_turn(world: World, peers: PeerKeeper) -> None:
    assert looks(world, peers, 8) == 8  # nobody is there
    world.enter("a")
    world.refuses = True
    assert looks(world, peers, 8) == 8
    world.refuses = False
    peers._turn()
    assert len(world.linked) == 1


def test_a_lost_link_is_looked_after_at_once(world: World, peers: PeerKeeper) -> None:
    world.enter("a")
    world.enter("b")
    looks(world, peers, 2)
    world.linked = {each for each in world.linked if each[0] != "a"}
    world.enter("a", epoch=2)
    peers._turn()
    assert (WorkerId("a"), Epoch(2)) in world.linked


def test_one_who_comes_later_is_found_within_few_turns(world: World, peers: PeerKeeper) -> None:
    world.enter("a")
    looks(world, peers, 2)
    world.enter("b")
    looks(world, peers, CALM_TURNS)
    assert {name for name, _ in world.linked} == {"a", "b"}
