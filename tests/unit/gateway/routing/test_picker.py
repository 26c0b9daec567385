"""Choosing workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from antiphon.core.errors import Overloaded, Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.gateway.routing.picker import MAX_IMBALANCE, MAX_RETRY_AFTER_S, WorkerSnapshot, pick


def info(name: str = "a", **changes: object) -> WorkerInfo:
    base = WorkerInfo(
        worker_id=WorkerId(name),
        deployment="d",
        pool="p",
        role=Role.DECODE,
        model="m",
        revision="r1",
        fingerprint="f",
        epoch=Epoch(1),
        endpoint=Endpoint(rpc="h:1"),
        pid=1,
        host="h",
        ready=True,
        max_num_seqs=8,
        max_queued_requests=8,
        load=WorkerLoad(num_free_blocks=100, num_total_blocks=100),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def snapshot(name: str = "a", *, num_inflight: int = 0, then: int = 0, connected: bool = True, **changes: object) -> WorkerSnapshot:
    return WorkerSnapshot(info=info(name, **changes), num_inflight=num_inflight, num_inflight_then=then, connected=connected)


def load(running: int = 0, waiting: int = 0, free: int = 100) -> WorkerLoad:
    return WorkerLoad(num_running=running, num_waiting=waiting, num_free_blocks=free, num_total_blocks=100)


def chosen(*snapshots: WorkerSnapshot, **options: object) -> str:
    return pick("m", snapshots, **{"num_prompt_tokens": 10, **options}).worker  # type: ignore[arg-type]


def test_the_least_loaded_worker_is_taken() -> None:
    assert chosen(snapshot("a", load=load(running=4)), snapshot("b", load=load(running=1))) == "b"


def test_a_queue_that_another_tenant_has_filled_does_not_refuse_who_has_less_in_it() -> None:
    full = snapshot("a", load=load(running=8, waiting=8))
    with pytest.raises(Overloaded):
        chosen(full)
    assert chosen(replace(full, makes_way=True)) == "a"
    assert chosen(replace(full, makes_way=True), snapshot("b", load=load(running=8, waiting=7))) == "b"


def test_a_fuller_kv_cache_tips_the_balance() -> None:
    assert chosen(snapshot("a", load=load(free=10)), snapshot("b", load=load(free=90))) == "b"


def test_own_requests_count_before_the_lease_shows_them() -> None:
    assert chosen(snapshot("a", num_inflight=3), snapshot("b", load=load(running=2))) == "b"


def test_own_requests_that_the_lease_shows_count_once() -> None:
    a = snapshot("a", num_inflight=3, then=3, load=load(running=3))
    assert a.num_requests == 3


def test_finished_requests_no_longer_count_though_the_lease_shows_them() -> None:
    assert snapshot("a", num_inflight=0, then=3, load=load(running=4)).num_requests == 1


def test_equally_loaded_workers_take_turns() -> None:
    workers = (snapshot("a"), snapshot("b"), snapshot("c"))
    assert [chosen(*workers, turn=turn) for turn in range(4)] == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "changes",
    [{"ready": False}, {"draining": True}, {"model": "other"}, {"role": Role.PREFILL}, {"role": Role.FFN}],
    ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values()))),
)
def test_a_worker_that_cannot_serve_is_not_taken(changes: dict[str, object]) -> None:
    assert chosen(snapshot("a", **changes), snapshot("b", load=load(running=7))) == "b"
    with pytest.raises(Unavailable):
        chosen(snapshot("a", **changes))


def test_the_refusal_says_why_nobody_is_ready() -> None:
    with pytest.raises(Unavailable, match="loading weights"):
        chosen(snapshot("a", ready=False, message="loading weights"))


def test_a_connected_worker_goes_before_an_idler_one_without_session() -> None:
    assert chosen(snapshot("a", connected=False), snapshot("b", load=load(running=5))) == "b"
    assert chosen(snapshot("a", connected=False)) == "a"


def test_a_worker_that_just_failed_is_only_the_last_resort() -> None:
    workers = (snapshot("a"), snapshot("b", load=load(running=5)))
    assert chosen(*workers, excluded={WorkerId("a")}) == "b"
    assert chosen(workers[0], excluded={WorkerId("a")}) == "a"


def test_a_resumed_request_stays_with_its_revision_while_there_is_any() -> None:
    old, new = snapshot("old", load=load(running=5)), snapshot("new", revision="r2")
    assert chosen(old, new, revision="r1") == "old"
    assert chosen(new, revision="r1") == "new"
    with pytest.raises(Unavailable):
        chosen(snapshot("old", ready=False), new, revision="r1")


def test_full_queues_are_refused_with_a_time_to_wait() -> None:
    full = load(running=8, waiting=8)
    with pytest.raises(Overloaded) as caught:
        chosen(snapshot("a", load=full), snapshot("b", load=full))
    assert 1 <= caught.value.retry_after_s <= MAX_RETRY_AFTER_S


def test_a_full_worker_is_passed_over() -> None:
    assert chosen(snapshot("a", load=load(running=8, waiting=8)), snapshot("b", load=load(running=8, waiting=7))) == "b"


def test_a_queue_that_is_full_for_want_of_kv_is_full() -> None:
    assert snapshot("a", load=load(running=2, waiting=8)).is_full
    assert snapshot("a", load=load(running=2, waiting=6), num_inflight=2).is_full
    assert not snapshot("a", load=load(running=2, waiting=6), num_inflight=1).is_full
    assert snapshot("a", load=load(running=2, waiting=8), num_inflight=10, then=10).is_full
    assert not snapshot("a", load=load(running=2, waiting=8), num_inflight=9, then=10).is_full  # one has ended since


def test_an_idle_worker_takes_as_many_as_run_and_wait() -> None:
    assert not snapshot("a", num_inflight=15).is_full
    assert snapshot("a", num_inflight=16).is_full


def test_a_worker_without_stated_limits_is_never_full() -> None:
    assert not snapshot("a", max_num_seqs=0, max_queued_requests=0, num_inflight=10_000).is_full


def test_a_known_beginning_attracts() -> None:
    workers = (snapshot("a", load=load(running=2)), snapshot("b"))
    plan = pick("m", workers, num_prompt_tokens=100, prefix={WorkerId("a"): 64})
    assert (plan.worker, plan.why, plan.num_prefix_tokens) == ("a", "prefix", 64)


def test_a_known_beginning_does_not_pile_requests_up() -> None:
    workers = (snapshot("a", load=load(running=7)), snapshot("b"))
    plan = pick("m", workers, num_prompt_tokens=100, prefix={WorkerId("a"): 64})
    assert (plan.worker, plan.why) == ("b", "load")


def test_a_prefill_worker_is_chosen_where_it_is_worth_it() -> None:
    workers = (
        snapshot("d"),
        snapshot("p", role=Role.PREFILL, load=load(running=1)),
        snapshot("q", role=Role.PREFILL),
    )
    assert pick("m", workers, num_prompt_tokens=64, remote_prefill_min_tokens=64).prefill_worker == "q"
    assert pick("m", workers, num_prompt_tokens=63, remote_prefill_min_tokens=64).prefill_worker is None
    warm = pick("m", workers, num_prompt_tokens=100, prefix={WorkerId("d"): 64}, remote_prefill_min_tokens=64)
    assert warm.prefill_worker is None


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "r2"},
        {"fingerprint": "g"},
        {"deployment": "e"},
        {"ready": False},
        {"draining": True},
        {"load": load(running=8, waiting=8)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_prefill_worker_that_does_not_pair_is_left_out(changes: dict[str, object]) -> None:
    workers = (snapshot("d"), snapshot("p", **{"role": Role.PREFILL, **changes}))
    assert pick("m", workers, num_prompt_tokens=1000).prefill_worker is None


SNAPSHOTS = st.lists(
    st.builds(
        lambda index, running, waiting, free, inflight, then, ready, draining, connected: snapshot(
            f"w{index}",
            load=load(running, waiting, free),
            num_inflight=inflight,
            then=then,
            ready=ready,
            draining=draining,
            connected=connected,
        ),
        st.integers(0, 10**9),
        st.integers(0, 8),
        st.integers(0, 10),
        st.integers(0, 120),
        st.integers(0, 20),
        st.integers(0, 20),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda s: s.info.worker_id,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SNAPSHOTS, st.integers(0, 1000), st.dictionaries(st.integers(0, 7), st.integers(0, 500)))
def test_the_choice_is_always_able_and_nearly_the_cheapest(
    snapshots: list[WorkerSnapshot], turn: int, cached: dict[int, int]
) -> None:
    prefix = {s.info.worker_id: cached[index] for index, s in enumerate(snapshots) if index in cached}
    able = [s for s in snapshots if s.info.ready and not s.info.draining]
    candidates = [s for s in able if s.connected] or able
    free = [s for s in candidates if not s.is_full]
    try:
        plan = pick("m", snapshots, num_prompt_tokens=500, prefix=prefix, turn=turn)
    except Unavailable:
        assert not able
        return
    except Overloaded:
        assert able
        assert not free
        return
    taken = next(s for s in free if s.info.worker_id == plan.worker)
    assert taken.cost <= min(s.cost for s in free) + MAX_IMBALANCE
    assert plan.num_prefix_tokens <= 500


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SNAPSHOTS)
def test_the_estimate_is_never_below_our_own_requests(snapshots: list[WorkerSnapshot]) -> None:
    for s in snapshots:
        assert s.num_requests >= s.num_inflight
        assert 0 <= s.num_waiting <= s.num_requests
        assert 0 <= s.kv_usage <= 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SNAPSHOTS, st.integers(0, 7))
def test_the_choice_never_gets_worse_when_another_worker_gets_busier(snapshots: list[WorkerSnapshot], which: int) -> None:
    """More load on a worker that was not taken leaves the choice as it was."""
    try:
        before = pick("m", snapshots, num_prompt_tokens=10)
    except (Unavailable, Overloaded):
        return
    assume(which < len(snapshots) and snapshots[which].info.worker_id != before.worker)
    cheaper = next(s for s in snapshots if s.info.worker_id == before.worker).cost
    assume(snapshots[which].cost > cheaper)
    busier = replace(snapshots[which], num_inflight=snapshots[which].num_inflight + 5)
    after = pick("m", [*snapshots[:which], busier, *snapshots[which + 1 :]], num_prompt_tokens=10)
    assert after.worker == before.worker
