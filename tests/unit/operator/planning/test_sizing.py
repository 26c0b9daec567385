"""Sizes: properties over random pools, with brute force as the independent reference."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.document.policies import RatioSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.planning.sizing import (
    Limit,
    PoolBounds,
    bounds_of,
    constraints_of,
    cost,
    next_sizes,
    plan_sizes,
    ratio_constraints,
)


@st.composite
def pools(draw: st.DrawFn) -> list[PoolBounds]:
    out = []
    for name in ("a", "f", "p")[: draw(st.integers(2, 3))]:
        step = draw(st.sampled_from((1, 1, 2)))
        floor = draw(st.integers(0, 2)) * step
        out.append(
            PoolBounds(
                name=name, floor=floor, ceiling=floor + draw(st.integers(0, 3)) * step, step=step, gpus=draw(st.integers(0, 3))
            )
        )
    return out


QUOTIENT = st.sampled_from((None, 0.5, 1.0, 1.5, 2.0, 3.0))


@st.composite
def ratio_specs(draw: st.DrawFn, names: list[str]) -> list[RatioSpec]:
    out = []
    for _ in range(draw(st.integers(0, 2))):
        numerator, denominator = draw(st.permutations(names))[:2]
        low, high = sorted((draw(QUOTIENT), draw(QUOTIENT)), key=lambda q: q if q is not None else 9.0)
        out.append(RatioSpec(numerator=numerator, denominator=denominator, min=low, max=high))
    return out


def within(ratios: list[RatioSpec], sizes: dict[str, int]) -> bool:
    """The quotients' bounds, straight from their definition."""
    for ratio in ratios:
        above, below = sizes[ratio.numerator], sizes[ratio.denominator]
        if ratio.min is not None and above < ratio.min * below - 1e-9:
            return False
        if ratio.max is not None and above > ratio.max * below + 1e-9:
            return False
    return True


def all_sizes(bounds: list[PoolBounds]) -> list[dict[str, int]]:
    ranges = [range(pool.floor, pool.ceiling + 1, pool.step) for pool in bounds]
    return [dict(zip([pool.name for pool in bounds], combination, strict=True)) for combination in itertools.product(*ranges)]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_sizes_are_within_bounds_ratios_and_budget_wherever_some_sizes_are(data: st.DataObject) -> None:
    bounds = data.draw(pools())
    names = [pool.name for pool in bounds]
    ratios = data.draw(ratio_specs(names))
    budget = data.draw(st.one_of(st.none(), st.integers(0, 30)))
    wishes = {name: data.draw(st.integers(0, 12)) for name in names}
    planned = dict(plan_sizes(bounds, wishes, ratio_constraints(ratios), budget).replicas)
    if budget is not None:
        assert cost(bounds, planned) <= budget
    for pool in bounds:
        assert planned[pool.name] % pool.step == 0
        assert planned[pool.name] <= pool.ceiling
    affordable = [sizes for sizes in all_sizes(bounds) if budget is None or cost(bounds, sizes) <= budget]
    if any(within(ratios, sizes) for sizes in affordable):
        assert within(ratios, planned)
    if affordable:
        floors = {pool.name: pool.floor for pool in bounds}
        feasible_ratio = any(within(ratios, sizes) for sizes in affordable)
        if feasible_ratio or not any(within(ratios, sizes) for sizes in all_sizes(bounds)):
            assert all(planned[name] >= floors[name] for name in names)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_step_on_the_way_exceeds_the_budget_and_the_way_ends(data: st.DataObject) -> None:
    bounds = data.draw(pools())
    names = [pool.name for pool in bounds]
    constraints = ratio_constraints(data.draw(ratio_specs(names)))
    start = dict(plan_sizes(bounds, {n: data.draw(st.integers(0, 9)) for n in names}, constraints, 20).replicas)
    target = dict(plan_sizes(bounds, {n: data.draw(st.integers(0, 9)) for n in names}, constraints, 20).replicas)
    running = start
    for _ in range(8):
        asked = next_sizes(bounds, running, target, constraints, 20)
        assert cost(bounds, {n: max(running[n], asked[n]) for n in names}) <= 20
        running = asked
        if running == target:
            break
    assert running == target


def document(**extra: object) -> LLMDeployment:
    spec: dict[str, object] = {
        "model": {"uri": "/m"},
        "topology": "afd",
        "pools": [
            {"name": "attn", "role": "attention", "scaling": {"mode": "External", "minReplicas": 0, "maxReplicas": 4}},
            {
                "name": "ffn",
                "role": "ffn",
                "replicas": 4,
                "parallelism": {"expert": 4},
                "scaling": {"mode": "External", "minReplicas": 0, "maxReplicas": 8},
            },
        ],
    }
    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "d"},
            "spec": {**spec, **extra},
        }
    )


@given(st.integers(0, 6), st.integers(0, 12))
@settings(deadline=None)
def test_where_attention_runs_every_expert_has_a_shard(attention: int, ffn: int) -> None:
    spec = document().spec
    sizes = plan_sizes(bounds_of(spec), {"attn": attention, "ffn": ffn}, constraints_of(spec)).replicas
    assert sizes["ffn"] % 4 == 0
    assert sizes["attn"] == 0 or sizes["ffn"] >= 4


def test_a_short_side_is_raised_before_a_long_one_is_cut() -> None:
    bounds = [PoolBounds(name="a", floor=1, ceiling=8), PoolBounds(name="f", floor=1, ceiling=8)]
    ratio = ratio_constraints([RatioSpec(numerator="f", denominator="a", min=2)])
    assert plan_sizes(bounds, {"a": 3, "f": 1}, ratio).replicas == {"a": 3, "f": 6}
    assert plan_sizes(bounds, {"a": 6, "f": 1}, ratio).replicas == {"a": 4, "f": 8}


def test_a_pool_says_what_limits_it() -> None:
    bounds = [PoolBounds(name="a", floor=1, ceiling=4, gpus=1), PoolBounds(name="f", floor=1, ceiling=4, gpus=2)]
    assert plan_sizes(bounds, {"a": 9, "f": 1}).limited == {"a": Limit.MIN_MAX}
    assert plan_sizes(bounds, {"a": 1, "f": 4}, gpu_budget=6).limited == {"f": Limit.GPU_BUDGET}


def test_pools_that_grow_wait_for_the_accelerators_of_pools_that_shrink() -> None:
    bounds = [PoolBounds(name="a", floor=1, ceiling=8, gpus=1), PoolBounds(name="f", floor=1, ceiling=8, gpus=1)]
    first = next_sizes(bounds, {"a": 6, "f": 2}, {"a": 2, "f": 6}, gpu_budget=8)
    assert first == {"a": 2, "f": 2}
    assert next_sizes(bounds, first, {"a": 2, "f": 6}, gpu_budget=8) == {"a": 2, "f": 6}
