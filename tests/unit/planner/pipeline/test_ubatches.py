"""The ubatch pipeline: exact simulation against enumeration, against a tick-by-tick run, and against closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.planner.pipeline.ubatches import (
    StageTimes,
    min_ubatches,
    simulate,
    simulate_layers,
    step_s,
    ubatches_to_hide,
    uniform_step_s,
)

microseconds = st.integers(min_value=0, max_value=50)
positive = st.integers(min_value=1, max_value=50)


def times(attention, a2f, ffn, f2a):
    return StageTimes(attention_s=attention, a2f_s=a2f, ffn_s=ffn, f2a_s=f2a)


def longest_path(attention, a2f, ffn, f2a):
    """Brute force: enumerate every chain of tasks that must follow each other, and take the longest."""
    _, num_layers, num_ubatches = attention.shape
    duration = {}
    for layer, ubatch in itertools.product(range(num_layers), range(num_ubatches)):
        duration["a", layer, ubatch] = attention[0, layer, ubatch]
        duration["o", layer, ubatch] = a2f[0, layer, ubatch]
        duration["f", layer, ubatch] = ffn[layer, ubatch]
        duration["b", layer, ubatch] = f2a[0, layer, ubatch]
    after = {"a": "o", "o": "f", "f": "b"}

    def successors(task):
        stage, layer, ubatch = task
        if stage in after:
            yield (after[stage], layer, ubatch)
        elif layer + 1 < num_layers:
            yield ("a", layer + 1, ubatch)
        following = layer * num_ubatches + ubatch + 1  # the same stage serves ubatches in turn
        if following < num_layers * num_ubatches:
            yield (stage, following // num_ubatches, following % num_ubatches)

    def chains(task):
        ends = True
        for successor in successors(task):
            ends = False
            for rest in chains(successor):
                yield duration[task] + rest
        if ends:
            yield duration[task]

    return max(chains(("a", 0, 0)))


def tick_by_tick(attention, a2f, ffn, f2a):
    """A clock that advances one unit at a time; every stage takes the next ubatch as soon as it may."""
    _, num_layers, num_ubatches = attention.shape
    order = [(layer, ubatch) for layer in range(num_layers) for ubatch in range(num_ubatches)]
    length = {
        0: lambda job: int(attention[0][job]),
        1: lambda job: int(a2f[0][job]),
        2: lambda job: int(ffn[job]),
        3: lambda job: int(f2a[0][job]),
    }
    done_at = {}  # (stage, job) -> time
    following, running = [0] * 4, [None] * 4
    now = 0
    while (3, order[-1]) not in done_at:
        progress = True
        while progress:
            progress = False
            for stage in range(4):
                if running[stage] is not None and running[stage][1] <= now:
                    done_at[stage, running[stage][0]] = running[stage][1]
                    running[stage] = None
                    progress = True
                if running[stage] is None and following[stage] < len(order):
                    job = order[following[stage]]
                    ready = (stage - 1, job) in done_at if stage else job[0] == 0 or (3, (job[0] - 1, job[1])) in done_at
                    if ready:
                        running[stage] = (job, now + length[stage](job))
                        following[stage] += 1
                        progress = True
        now += 1
    return done_at[3, order[-1]]


def random_pipeline(rng, num_layers, num_ubatches):
    size = (1, num_layers, num_ubatches)
    attention, a2f, f2a = (rng.integers(0, 9, size=size).astype(float) for _ in range(3))
    return attention, a2f, rng.integers(0, 9, size=size[1:]).astype(float), f2a


@pytest.mark.parametrize("seed", range(20))
def test_a_small_pipeline_takes_exactly_its_longest_chain(seed):
    rng = np.random.default_rng(seed)
    pipeline = random_pipeline(rng, int(rng.integers(1, 3)), int(rng.integers(1, 4)))
    assert simulate(*pipeline).step_s == longest_path(*pipeline)


@pytest.mark.parametrize("seed", range(20))
def test_a_pipeline_takes_exactly_as_long_as_a_clock_that_ticks_through_it(seed):
    rng = np.random.default_rng(100 + seed)
    pipeline = random_pipeline(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)))
    assert simulate(*pipeline).step_s == tick_by_tick(*pipeline)


def test_no_order_of_equal_ubatches_beats_the_fixed_one():
    """Every interleaving of two layers of two ubatches on four stages, enumerated."""
    stage = (3, 1, 2, 1)
    jobs = [(layer, ubatch) for layer in range(2) for ubatch in range(2)]
    orders = [o for o in itertools.permutations(jobs) if all(o.index((0, u)) < o.index((1, u)) for u in (0, 1))]

    def makespan(chosen):
        end, free, place = {}, [0] * 4, [0] * 4
        while len(end) < 16:
            moved = False
            for s in range(4):
                if place[s] == len(jobs):
                    continue
                job = chosen[s][place[s]]
                before = (s - 1, job) if s else ((3, (job[0] - 1, job[1])) if job[0] else None)
                if before is not None and before not in end:
                    continue
                start = max(free[s], end[before] if before else 0)
                end[s, job] = free[s] = start + stage[s]
                place[s] += 1
                moved = True
            if not moved:
                return float("inf")  # the orders of two stages block each other
        return max(end.values())

    best = min(makespan(chosen) for chosen in itertools.product(orders, repeat=4))
    assert simulate_layers([times(*stage)] * 2, 2).step_s == best


@given(positive, microseconds, positive, microseconds, st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_equal_layers_take_exactly_the_closed_form(attention, a2f, ffn, f2a, num_layers, num_ubatches):
    stage = times(attention, a2f, ffn, f2a)
    simulated = simulate_layers([stage] * num_layers, num_ubatches).step_s
    assert simulated == pytest.approx(
        uniform_step_s(round_s=stage.round_s, slowest_s=stage.slowest_s, num_layers=num_layers, num_ubatches=num_ubatches)
    )
    assert simulated == pytest.approx(step_s([(stage, num_layers)], num_ubatches))


@given(st.lists(st.tuples(positive, microseconds, positive, microseconds), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_layers_of_several_kinds_take_the_closed_form_within_their_rounds(stages, num_ubatches):
    kinds = [(times(*stage), 20) for stage in stages]
    simulated = simulate_layers([stage for stage, count in kinds for _ in range(count)], num_ubatches).step_s
    slack = sum(stage.round_s + num_ubatches * stage.slowest_s for stage, _ in kinds)
    assert step_s(kinds, num_ubatches) == pytest.approx(simulated, abs=slack)


def test_megascale_infers_ubatch_rule_is_the_case_of_equal_halves():
    """arXiv 2504.02263: with T_a = T_f, m >= 2 (1 + T_c / T_f) ubatches keep both sides busy."""
    for half, link in ((10, 2), (10, 5), (10, 9), (7, 3)):
        rule = 2 * (1 + link / half)
        assert ubatches_to_hide(attention_s=half, ffn_s=half, link_s=link) == pytest.approx(rule)
        needed = min_ubatches(times(half, link, half, link))
        assert needed == int(np.ceil(rule - 1e-9))
        assert simulate_layers([times(half, link, half, link)] * 50, needed, keep_segments=True).busy_share("ffn") > 0.95
        too_few = simulate_layers([times(half, link, half, link)] * 50, needed - 1, keep_segments=True)
        assert too_few.busy_share("ffn") < 0.95


def test_megascale_infers_step_time_is_the_case_of_enough_ubatches():
    """arXiv 2504.02263: T_total = (T_a + T_f + 2 T_c) + T_f (m L - 1) when T_a ~ T_f and T_c < T_f."""
    attention, ffn, link, num_layers = 9, 10, 4, 8
    m = min_ubatches(times(attention, link, ffn, link))
    run = simulate_layers([times(attention, link, ffn, link)] * num_layers, m)
    total = (attention + ffn + 2 * link) + ffn * (m * num_layers - 1)
    assert run.step_s == total
    # Each ubatch's own time lies between (T_a + T_f + 2 T_c) + m T_f (L - 1) and m T_f L, as its start is m T_a at most.
    assert run.finish_s[0] == (attention + ffn + 2 * link) + m * ffn * (num_layers - 1)
    assert run.finish_s[0] <= m * ffn * num_layers


def test_step_3s_three_stages_make_fifty_milliseconds():
    """arXiv 2507.19427: 61 layers, three ubatches, 272 us for each of A, F and both ways together."""
    stage = 16.6e-3 / 61
    run = simulate_layers([times(stage, stage / 2, stage, stage / 2)] * 61, 3)
    assert run.step_s == pytest.approx(0.050, rel=0.02)


def test_the_ffn_waits_for_the_slowest_of_several_workers():
    even = simulate_layers([times(10, 1, 10, 1)] * 10, 2, num_workers=3).step_s
    assert even == simulate_layers([times(10, 1, 10, 1)] * 10, 2).step_s
    one_slow = simulate_layers([times(10, 1, 10, 1)] * 10, 2, num_workers=3, slowdowns=(1.0, 2.0)).step_s
    assert one_slow == simulate_layers([times(20, 1, 10, 1)] * 10, 2).step_s


def test_variation_only_costs_time():
    calm = simulate_layers([times(10, 2, 10, 2)] * 30, 3, num_workers=4).step_s
    shaky = [simulate_layers([times(10, 2, 10, 2)] * 30, 3, num_workers=4, variation=0.3, seed=s).step_s for s in range(5)]
    assert min(shaky) > calm


def test_segments_never_overlap_in_a_stage_and_cover_every_visit():
    run = simulate_layers([times(3, 1, 4, 1)] * 5, 3, num_workers=2, keep_segments=True)
    for stage, workers in (("attention", 2), ("a2f", 2), ("ffn", 1), ("f2a", 2)):
        for worker in range(workers):
            mine = sorted((s.start_s, s.end_s) for s in run.segments if (s.stage, s.worker) == (stage, worker))
            assert len(mine) == 15
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine))
