import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.coe.tiers.policy import (
    Load,
    Prefetch,
    Serve,
    Tier,
    TierExpert,
    TierLimits,
    TierState,
    Wait,
    Waiting,
    after,
    plan,
    prefetch,
)
from antiphon.coe.tiers.simulation import Service, first_come, play, random_trace

EXPERTS = {name: TierExpert(name=name, memory_bytes=1, host_bytes=1, fetch_s=1.5, load_s=0.5) for name in "abcdef"}
LIMITS = TierLimits(resident_bytes=2, host_bytes=3, fairness_window_s=10.0, max_group=16)
SERVICE = Service(base_s=0.1, per_request_s=0.02)
AT_ONCE = replace(LIMITS, load_wait_factor=0.0)
EMPTY = TierState(resident=(), host=())


def _wait(request_id: int, expert: str, arrival_s: float = 0.0) -> Waiting:
    return Waiting(request_id=request_id, expert=expert, arrival_s=arrival_s)


def test_requests_at_a_resident_expert_are_served_together() -> None:
    waiting = [_wait(0, "a"), _wait(1, "b", 0.1), _wait(2, "a", 0.2)]
    action = plan(EXPERTS, TierState(resident=("a",), host=()), waiting, {}, 1.0, LIMITS)
    assert action == Serve(expert="a", request_ids=(0, 2))


def test_a_request_older_than_the_window_comes_first() -> None:
    waiting = [_wait(0, "c"), _wait(1, "a", 9.0), _wait(2, "a", 9.0)]
    action = plan(EXPERTS, TierState(resident=("b", "a"), host=("c",)), waiting, {"b": 0.1}, 10.0, LIMITS)
    assert action == Load(expert="c", evict=("b",), from_tier=Tier.HOST)


def test_the_resident_that_is_least_expected_goes_and_a_copy_is_kept_where_there_is_room() -> None:
    state = TierState(resident=("a", "b"), host=())
    action = plan(EXPERTS, state, [_wait(0, "c")], {"a": 2.0, "b": 0.5}, 0.0, AT_ONCE)
    assert action == Load(expert="c", evict=("b",), from_tier=Tier.DISK, keep=True)
    assert after(action, state) == TierState(resident=("a", "c"), host=("c",))


def test_a_load_into_free_room_or_over_one_that_nobody_asks_for_is_not_put_off() -> None:
    free = TierState(resident=("a",), host=("c",))
    assert plan(EXPERTS, free, [_wait(0, "c")], {"a": 9.0}, 0.0, LIMITS) == Load(expert="c", evict=(), from_tier=Tier.HOST)
    idle = TierState(resident=("a", "b"), host=("c",))
    assert plan(EXPERTS, idle, [_wait(0, "c")], {"a": 9.0}, 0.0, LIMITS) == Load(expert="c", evict=("b",), from_tier=Tier.HOST)


def test_a_load_over_experts_in_demand_is_due_once_others_have_waited_for_it_long_enough_together() -> None:
    state, expected = TierState(resident=("a", "b"), host=("c",)), {"a": 50.0, "b": 50.0}
    waiting = [_wait(0, "c", 1.0), _wait(1, "c", 1.0)]
    put_off = plan(EXPERTS, state, waiting, expected, 1.0, LIMITS)
    assert isinstance(put_off, Wait)
    assert put_off.until_s == pytest.approx(1.0 + LIMITS.load_wait_factor * EXPERTS["c"].load_s / 2, abs=1e-3)
    assert isinstance(plan(EXPERTS, state, waiting, expected, put_off.until_s, LIMITS), Load)
    patient = replace(LIMITS, load_wait_factor=1e9)
    assert plan(EXPERTS, state, waiting, expected, 2.0, patient) == Wait(until_s=1.0 + LIMITS.fairness_window_s)


def test_a_busy_resident_is_evicted_only_when_no_other_will_do() -> None:
    state = TierState(resident=("a", "b"), host=("c",), busy=frozenset("a"))
    action = plan(EXPERTS, state, [_wait(0, "c")], {"b": 5.0}, 0.0, AT_ONCE)
    assert action == Load(expert="c", evict=("b",), from_tier=Tier.HOST)


def test_a_load_from_disk_never_drops_the_copy_of_an_absent_expert() -> None:
    state = TierState(resident=("a", "b"), host=("a", "d", "e"))
    action = plan(EXPERTS, state, [_wait(0, "c")], {"a": 2.0}, 0.0, AT_ONCE)
    assert action == Load(expert="c", evict=("b",), from_tier=Tier.DISK, keep=True, drop=("a",))
    full = TierState(resident=("a", "b"), host=("d", "e", "f"))
    assert plan(EXPERTS, full, [_wait(0, "c")], {"a": 2.0}, 0.0, AT_ONCE) == Load(expert="c", evict=("b",), from_tier=Tier.DISK)


def test_the_likeliest_absent_expert_is_brought_nearer() -> None:
    limits = TierLimits(resident_bytes=2, host_bytes=1, fairness_window_s=10.0, max_group=16)
    state = TierState(resident=("a",), host=("b",))
    assert prefetch(EXPERTS, state, [], {"b": 0.1, "c": 0.9}, limits) == Prefetch(expert="c", drop=("b",))
    assert prefetch(EXPERTS, state, [], {"b": 0.9, "c": 0.1}, limits) is None
    assert prefetch(EXPERTS, state, [_wait(0, "d")], {"b": 0.9, "c": 5.0}, limits) == Prefetch(expert="d", drop=("b",))


@pytest.mark.parametrize("rate", [4.0, 8.0])
def test_busy_traces_are_served_twice_as_fast_with_half_the_switches(rate: float) -> None:
    faster, fewer = [], []
    for seed in range(9):
        trace = random_trace("abcdef", 300, rate, 1.0, 0.3, seed)
        mine = play(trace, EXPERTS, LIMITS, SERVICE, with_prefetch=True)
        theirs = play(trace, EXPERTS, LIMITS, SERVICE, first_come)
        faster.append(mine.throughput / theirs.throughput)
        fewer.append(mine.num_switches / theirs.num_switches)
    assert statistics.median(faster) >= 2.0
    assert statistics.median(fewer) <= 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8.0), st.floats(0.0, 2.0), st.floats(0.0, 0.9))
def test_nobody_waits_beyond_the_window_and_the_service_of_those_before(seed: int, rate: float, skew: float, stay: float) -> None:
    trace = random_trace("abcdef", 120, rate, skew, stay, seed)
    outcome = play(trace, EXPERTS, LIMITS, SERVICE, with_prefetch=bool(seed % 2))
    assert outcome.num_served == len(trace)
    # Once overdue, a request waits for the action under way, and for a load and a group of those that came before it: no one else.
    load_s, group_s = 2.0, SERVICE.group_s(LIMITS.max_group)
    starts_s = {r.request_id: r.arrival_s + wait for r, wait in zip(trace, outcome.waits_s, strict=True)}
    for request, wait_s in zip(trace, outcome.waits_s, strict=True):
        overdue_s = request.arrival_s + LIMITS.fairness_window_s
        before = Counter(r.expert for r in trace if r.request_id <= request.request_id and starts_s[r.request_id] >= overdue_s)
        turns = sum(math.ceil(n / LIMITS.max_group) for n in before.values())
        assert wait_s <= LIMITS.fairness_window_s + max(load_s, group_s) + turns * (load_s + group_s)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 30)), min_size=1, max_size=30))
def test_memory_is_never_exceeded(requests: list[tuple[str, float]]) -> None:
    state = EMPTY
    waiting = [_wait(i, expert, at) for i, (expert, at) in enumerate(requests)]
    for step in range(200):
        action = plan(EXPERTS, state, waiting, {}, float(step), LIMITS)
        if action is None:
            break
        assert not isinstance(action, Wait)  # without a forecast nobody is wanted back
        if isinstance(action, Serve):
            assert action.expert in state.resident
            waiting = [w for w in waiting if w.request_id not in action.request_ids]
        state = after(action, state)
        assert len(state.resident) <= 2
        copy = prefetch(EXPERTS, state, waiting, {}, LIMITS)
        state = state if copy is None else after(copy, state)
        assert len(state.host) <= 3
        assert len(set(state.host)) == len(state.host)
    assert waiting == []
