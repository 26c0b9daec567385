"""Gathering rows of several peers, against a simulated FFN worker with peers that think for a while between two layers."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from antiphon.worker.batching import Batching

NUM_LAYERS = 12
BOUND_S = 2e-3
BATCH_S, ROW_S = 900e-6, 20e-6


@dataclass
class Run:
    """What a simulated worker saw."""

    batches: list[tuple[float, int]] = field(default_factory=list)  # (when, peers in it)
    held_s: list[float] = field(default_factory=list)  # per message, from arrival until nothing else delayed it
    steps: dict[int, int] = field(default_factory=dict)  # by peer
    end_s: float = 0.0

    def fill(self, after_s: float) -> float:
        late = [size for when, size in self.batches if when > after_s]
        return sum(late) / len(late)


def simulate(think_s: list[float], *, bound_s: float, until_s: float, start_s: list[float], gone_s: float = 1e9) -> Run:
    """Peers of one row each; between two steps they take ten times as long. The last peer leaves at ``gone_s``."""
    batching: Batching[int] = Batching(bound_s)
    chance = random.Random(1)
    coming = [(start, peer, 0) for peer, start in enumerate(start_s)]
    heapq.heapify(coming)
    here: dict[int, tuple[int, float]] = {}
    run, now, free = Run(), 0.0, 0.0
    while now < until_s:
        while coming and coming[0][0] <= now:
            arrived, peer, layer = heapq.heappop(coming)
            here[peer] = (layer, arrived)
            batching.arrived(peer, 0, layer, arrived)
        until = {peer: batching.hold_until(peer, 0, now) for peer in here}
        assert all(until[peer] <= max(now, here[peer][1] + bound_s) for peer in here)
        ready: dict[int, list[int]] = {}
        for peer, when in until.items():
            if when <= now:
                ready.setdefault(here[peer][0], []).append(peer)
        if not ready:
            now = min([*until.values(), *(arrival[0] for arrival in coming[:1])])
            continue
        for layer, peers in ready.items():
            run.held_s += [now - max(here[peer][1], free) for peer in peers]
            run.batches.append((now, len(peers)))
            now += BATCH_S + ROW_S * len(peers)
            for peer in peers:
                del here[peer]
                batching.answered(peer, 0, now, BATCH_S)
                last = layer == NUM_LAYERS - 1
                run.steps[peer] = run.steps.get(peer, 0) + last
                pause = think_s[peer] * (10 if last else 1) * chance.uniform(0.95, 1.05)
                if peer < len(think_s) - 1 or now < gone_s:
                    heapq.heappush(coming, (now + pause, peer, 0 if last else layer + 1))
        free = now
    run.end_s = now
    return run


@pytest.mark.parametrize("apart", [0.3e-3, 3e-3, 8e-3, 13e-3, 20e-3])
def test_equal_peers_come_into_step_wherever_they_start(apart: float) -> None:
    run = simulate([1e-3, 1e-3], bound_s=BOUND_S, until_s=2.0, start_s=[0.0, apart])
    assert run.fill(after_s=1.0) > 0.9 * 2


def test_three_peers_come_into_step() -> None:
    run = simulate([1e-3, 1.1e-3, 0.9e-3], bound_s=BOUND_S, until_s=3.0, start_s=[0.0, 5e-3, 11e-3])
    assert run.fill(after_s=1.5) > 0.9 * 3


def test_batching_serves_more_than_taking_turns() -> None:
    """Where the FFN side is the bottleneck, computing two at once is nearly free."""
    alone = simulate([0.3e-3, 0.3e-3], bound_s=0.0, until_s=2.0, start_s=[0.0, 8e-3])
    together = simulate([0.3e-3, 0.3e-3], bound_s=BOUND_S, until_s=2.0, start_s=[0.0, 8e-3])
    assert sum(together.steps.values()) > 1.15 * sum(alone.steps.values())
    assert together.fill(after_s=1.0) > 0.9 * 2


def test_nothing_is_held_longer_than_the_bound() -> None:
    run = simulate([1e-3, 1.2e-3, 5e-3], bound_s=BOUND_S, until_s=2.0, start_s=[0.0, 4e-3, 9e-3])
    assert max(run.held_s) <= BOUND_S + 1e-9


def test_a_quick_peer_is_not_slowed_down_to_the_pace_of_a_slow_one() -> None:
    alone = simulate([0.2e-3, 20e-3], bound_s=0.0, until_s=2.0, start_s=[0.0, 1e-3])
    beside = simulate([0.2e-3, 20e-3], bound_s=BOUND_S, until_s=2.0, start_s=[0.0, 1e-3])
    assert beside.steps[0] > 0.95 * alone.steps[0]


def test_a_peer_that_has_left_is_not_waited_for() -> None:
    run = simulate([1e-3, 1e-3], bound_s=BOUND_S, until_s=2.0, start_s=[0.0, 1e-4], gone_s=1.0)
    assert run.fill(after_s=1.1) == 1.0
    late = run.held_s[-100:]
    assert max(late) == 0.0


def test_a_single_peer_is_never_held() -> None:
    run = simulate([1e-3], bound_s=BOUND_S, until_s=0.5, start_s=[0.0])
    assert max(run.held_s) == 0.0


def test_ubatches_of_one_peer_do_not_wait_for_each_other() -> None:
    batching: Batching[str] = Batching(BOUND_S)
    for layer in range(3):
        for ubatch in (0, 1):
            batching.arrived("a", ubatch, layer, layer + 0.1 * ubatch)
            batching.answered("a", ubatch, layer + 0.1 * ubatch + 0.05, 0.01)
    batching.arrived("a", 0, 3, 3.0)
    assert batching.hold_until("a", 0, 3.0) <= 3.0


def test_a_peer_that_was_forgotten_holds_nobody() -> None:
    batching: Batching[str] = Batching(1.0)
    for layer in range(4):
        for peer in ("a", "b"):
            batching.arrived(peer, 0, layer, layer * 1.0)
            batching.answered(peer, 0, layer + 0.5, 0.1)
    batching.arrived("a", 0, 4, 4.0)
    assert batching.hold_until("a", 0, 4.0) > 4.0
    batching.keep(lambda peer: peer == "a")
    assert batching.hold_until("a", 0, 4.0) <= 4.0
