"""How many workers each pool gets: bounds, ratios, expert coverage, the accelerator budget (control speed, pure).

All constraints between two pools have one form, "a is at least f(b)" with f growing, so the sizes that satisfy them form a
lattice: there is a greatest set G and a least set L within the bounds, and raising the short side of any wish below G ends in
a set that satisfies everything. That is what is done, in this order:

    wish -> bounds -> cut the long side to G, raise the short side -> fit the budget, all pools at once

Must not know: where a wish comes from, or how a size is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from antiphon.core.document.policies import RatioSpec
from antiphon.core.document.spec import LLMDeploymentSpec

_EPSILON = 1e-9  # quotients such as 3/0.1 that miss an integer by rounding


class Limit(StrEnum):
    """Why a pool does not get the size it wants; reasons of the condition ScalingLimited."""

    GPU_BUDGET = "GpuBudget"
    RATIO = "Ratio"
    MIN_MAX = "MinMax"
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBounds:
    """What is fixed about a pool's size: it moves in steps of ``step`` workers (one copy of the weights)."""

    name: str
    floor: int
    ceiling: int
    step: int = 1
    gpus: int = 0  # accelerators per worker


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLeast:
    """``pool`` must have at least ``needed(other's size)`` workers; ``most(pool's size)`` is the other's limit that follows."""

    pool: str
    other: str
    needed: Callable[[int], int]
    most: Callable[[int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The outcome: workers per pool and what kept a pool from its wish."""

    replicas: Mapping[str, int]
    limited: Mapping[str, Limit]


def ratio_constraints(ratios: Sequence[RatioSpec]) -> list[AtLeast]:
    """The bounds on quotients as constraints. A denominator of zero asks for a numerator of zero where max is given."""
    out = []
    for ratio in ratios:
        if ratio.min is not None:
            out.append(_multiple(ratio.numerator, ratio.denominator, ratio.min))
        if ratio.max is not None:
            out.append(_multiple(ratio.denominator, ratio.numerator, 1.0 / ratio.max))
    return out


def _multiple(pool: str, other: str, factor: float) -> AtLeast:
    return AtLeast(
        pool=pool,
        other=other,
        needed=lambda size: math.ceil(size * factor - _EPSILON),
        most=lambda size: math.floor(size / factor + _EPSILON),
    )


def constraints_of(spec: LLMDeploymentSpec) -> list[AtLeast]:
    """Ratios of the document, and expert coverage: where attention runs, some FFN pool holds a whole copy."""
    out = ratio_constraints(spec.ratios)
    ffn = [pool for pool in spec.pools if pool.role == "ffn"]
    if ffn:
        copy = ffn[0].parallelism.num_shards
        for pool in spec.pools:
            if pool.role == "attention":
                out.append(_coverage(ffn[0].name, pool.name, copy))
    return out


def _coverage(ffn: str, attention: str, copy: int) -> AtLeast:
    return AtLeast(
        pool=ffn,
        other=attention,
        needed=lambda size: copy if size > 0 else 0,
        most=lambda size: 1 << 30 if size >= copy else 0,
    )


def bounds_of(spec: LLMDeploymentSpec) -> list[PoolBounds]:
    """The pools' bounds as the document gives them."""
    return [
        PoolBounds(
            name=pool.name,
            floor=pool.floor,
            ceiling=max(pool.floor, pool.ceiling),
            step=pool.parallelism.num_shards,
            gpus=pool.resources.gpu,
        )
        for pool in spec.pools
    ]


def cost(pools: Sequence[PoolBounds], sizes: Mapping[str, int]) -> int:
    """Accelerators that ``sizes`` use."""
    return sum(pool.gpus * sizes[pool.name] for pool in pools)


def satisfied(constraints: Sequence[AtLeast], sizes: Mapping[str, int]) -> bool:
    """True when every constraint holds."""
    return all(sizes[c.pool] >= c.needed(sizes[c.other]) for c in constraints)


def plan_sizes(
    pools: Sequence[PoolBounds],
    wishes: Mapping[str, int],
    constraints: Sequence[AtLeast] = (),
    gpu_budget: int | None = None,
) -> Sizes:
    """The sizes nearest to ``wishes`` that bounds, constraints and budget allow.

    Where no sizes within bounds satisfy the constraints, bounds and budget win and the pools are marked Ratio. Where even the
    floors cost more than the budget, whole pools are cut below their floors: the budget is never exceeded.
    """
    limited: dict[str, Limit] = {}
    wished: dict[str, int] = {}
    for pool in pools:
        size = _up(wishes[pool.name], pool.step)
        wished[pool.name] = min(max(size, pool.floor), pool.ceiling)
        if wished[pool.name] != size:
            limited[pool.name] = Limit.MIN_MAX
    floors = {pool.name: pool.floor for pool in pools}
    greatest = _lower(pools, constraints, {pool.name: pool.ceiling for pool in pools}, floors)
    if greatest is None:
        sizes = wished
        limited |= {name: Limit.RATIO for c in constraints for name in (c.pool, c.other)}
        if gpu_budget is not None and cost(pools, sizes) > gpu_budget:
            sizes = _fit(pools, (), sizes, floors, gpu_budget, limited)
        return Sizes(replicas=sizes, limited=limited)
    below = {name: min(size, greatest[name]) for name, size in wished.items()}
    sizes = _raise(pools, constraints, below)
    for name, size in sizes.items():
        if size != wished[name]:
            limited[name] = Limit.RATIO
    if gpu_budget is not None and cost(pools, sizes) > gpu_budget:
        least = _raise(pools, constraints, floors)
        sizes = _fit(pools, constraints, sizes, least, gpu_budget, limited)
    return Sizes(replicas=sizes, limited=limited)


def next_sizes(
    pools: Sequence[PoolBounds],
    running: Mapping[str, int],
    target: Mapping[str, int],
    constraints: Sequence[AtLeast] = (),
    gpu_budget: int | None = None,
) -> dict[str, int]:
    """The next sizes to ask for on the way from ``running`` to ``target``.

    While workers that must go still hold accelerators, workers that are to come wait: at no moment do both together exceed the
    budget. Asked again when the pools have shrunk, it ends at ``target``.
    """
    held = {name: max(running[name], size) for name, size in target.items()}
    if gpu_budget is None or cost(pools, held) <= gpu_budget:
        return dict(target)
    shrunk = {name: min(running[name], size) for name, size in target.items()}
    if satisfied(constraints, shrunk):
        return shrunk
    lowered = _lower(pools, constraints, shrunk, dict.fromkeys(shrunk, 0))
    # All zero satisfies every constraint, so there is always an answer; keep workers where shrinking further ends in nothing.
    if lowered is not None and (any(lowered.values()) or not any(target.values())):
        return lowered
    return shrunk


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _raise(pools: Sequence[PoolBounds], constraints: Sequence[AtLeast], sizes: Mapping[str, int]) -> dict[str, int]:
    """The least sizes, none below ``sizes``, that satisfy the constraints; the caller knows that some do within bounds."""
    steps = {pool.name: pool.step for pool in pools}
    out = dict(sizes)
    changed = True
    while changed:
        changed = False
        for c in constraints:
            needed = _up(c.needed(out[c.other]), steps[c.pool])
            if needed > out[c.pool]:
                out[c.pool], changed = needed, True
    return out


def _lower(
    pools: Sequence[PoolBounds], constraints: Sequence[AtLeast], sizes: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int] | None:
    """The greatest sizes, none above ``sizes``, that satisfy the constraints; None when they fall below ``least``."""
    steps = {pool.name: pool.step for pool in pools}
    out = dict(sizes)
    changed = True
    while changed:
        changed = False
        for c in constraints:
            most = c.most(out[c.pool]) // steps[c.other] * steps[c.other]
            if most < out[c.other]:
                out[c.other], changed = most, True
                if most < least[c.other]:
                    return None
    return out


def _fit(
    pools: Sequence[PoolBounds],
    constraints: Sequence[AtLeast],
    sizes: Mapping[str, int],
    least: Mapping[str, int],
    gpu_budget: int,
    limited: dict[str, Limit],
) -> dict[str, int]:
    """Cut ``sizes`` until they cost at most ``gpu_budget``, a step of the pool with the largest surplus at a time."""
    out = dict(sizes)
    while cost(pools, out) > gpu_budget:
        candidates = [pool for pool in pools if pool.gpus and out[pool.name] - pool.step >= least[pool.name]]
        if not candidates:
            return _below_floors(pools, out, gpu_budget, limited)
        pool = max(candidates, key=lambda p: ((out[p.name] - least[p.name]) * p.gpus, p.name))
        lowered = _lower(pools, constraints, {**out, pool.name: out[pool.name] - pool.step}, least)
        if lowered is None:  # cannot happen while ``least`` satisfies the constraints
            return _below_floors(pools, out, gpu_budget, limited)
        limited |= {name: Limit.GPU_BUDGET for name in out if lowered[name] != out[name]}
        out = lowered
    return out


def _below_floors(
    pools: Sequence[PoolBounds], sizes: Mapping[str, int], gpu_budget: int, limited: dict[str, Limit]
) -> dict[str, int]:
    """Even the floors are too dear: cut the dearest pools down, whatever the ratios say."""
    out = dict(sizes)
    while cost(pools, out) > gpu_budget:
        pool = max((p for p in pools if p.gpus and out[p.name] > 0), key=lambda p: (out[p.name] * p.gpus, p.name))
        out[pool.name] = max(0, out[pool.name] - pool.step)
        limited[pool.name] = Limit.GPU_BUDGET
    return out
