"""Which expert to load, serve or bring nearer next when not all fit in memory: a pure policy (request speed).

    disk ──fetch──► host memory ──load──► resident ──► serves        weights are read-only, so eviction only forgets them

    1. a request older than the fairness window: its expert is next, whatever it costs
    2. requests at a resident expert: serve the largest group
    3. requests elsewhere, once their load is due: load the expert with the most to serve per second of loading, over the residents
       least expected
    beside all this: copy the expert that is likeliest to be loaded next into host memory

A load is due when those who want it have waited, in sum, for ``load_wait_factor`` times as long as it takes, weighed by how likely
whoever is evicted for it is wanted back soon: at once into free room or over experts that nobody asks for, later over busy ones,
so that one switch serves more. A host copy of a resident expert is worth nothing until that one is evicted, so it is the first to
give way. Must not know: how weights move, clocks, which engine serves.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_SOON = 2.0  # times what bringing an evicted expert back takes


class Tier(enum.Enum):
    """Where an expert's weights are, nearest first."""

    RESIDENT = "resident"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierExpert:
    """What holding and moving an expert costs."""

    name: str
    memory_bytes: int  # while resident
    host_bytes: int  # of its copy in host memory
    fetch_s: float  # disk to host memory
    load_s: float  # host memory to ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that waits for its expert."""

    request_id: int
    expert: str
    arrival_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    """Where everything is, least recently used first. ``host`` holds copies, of resident experts too; the rest is on disk."""

    resident: tuple[str, ...]
    host: tuple[str, ...]
    busy: frozenset[str] = frozenset()  # residents in the middle of answers: evicted only when no other will do


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLimits:
    """Room, and how long a load is put off."""

    resident_bytes: int
    host_bytes: int
    fairness_window_s: float
    max_group: int  # requests served together
    load_wait_factor: float = 6.0  # see the module; 0 = load as soon as no resident has work


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Serve these requests together at a resident expert."""

    expert: str
    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Make an expert resident after evicting others. From disk, it leaves a copy in host memory when ``keep``."""

    expert: str
    evict: tuple[str, ...]
    from_tier: Tier
    keep: bool = False
    drop: tuple[str, ...] = ()  # host copies that give way to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Copy an expert from disk into host memory after dropping other copies."""

    expert: str
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing is worth doing before ``until_s``, unless something comes."""

    until_s: float


Action = Serve | Load | Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimes:
    """Measured stages of one load, in seconds."""

    evict_s: float
    read_s: float  # disk to host memory; 0 when a copy was there
    convert_s: float  # weights into the form that computes, and everything around them
    ready_s: float  # the first answer, which touches all of it

    @property
    def total_s(self) -> float:
        """All stages."""
        return self.evict_s + self.read_s + self.convert_s + self.ready_s


class ExpertLoader(Protocol):
    """Moves weights: at any time at most one load and one prefetch, never of the same expert."""

    async def load(self, action: Load, timeout_s: float) -> LoadTimes:
        """Evict and load. Raises DeadlineExceeded, Unavailable, CheckpointInvalid; residents that are not evicted stay."""
        ...

    async def prefetch(self, action: Prefetch, timeout_s: float) -> float:
        """Copy into host memory; seconds it took. Raises DeadlineExceeded, Unavailable, CheckpointInvalid."""
        ...


Policy = Callable[[Mapping[str, TierExpert], TierState, Sequence[Waiting], Mapping[str, float], float, TierLimits], Action | None]


def tier_of(expert: str, state: TierState) -> Tier:
    """Where an expert is, nearest."""
    if expert in state.resident:
        return Tier.RESIDENT
    return Tier.HOST if expert in state.host else Tier.DISK


def plan(
    experts: Mapping[str, TierExpert],
    state: TierState,
    waiting: Sequence[Waiting],
    expected: Mapping[str, float],
    now_s: float,
    limits: TierLimits,
) -> Action | None:
    """The next action; None when nobody waits. ``expected`` is the router's forecast: requests per second by expert."""
    oldest = min(waiting, key=lambda w: (w.arrival_s, w.request_id), default=None)
    if oldest is None:
        return None
    groups = _groups(waiting)

    def worth(name: str) -> tuple[float, ...]:
        return name in state.busy, len(groups.get(name, ())), expected.get(name, 0.0), state.resident.index(name)

    loads = {
        name: load_over(sorted(state.resident, key=worth), name, experts, state, limits)
        for name in groups
        if name not in state.resident
    }
    if now_s >= oldest.arrival_s + limits.fairness_window_s:
        return loads[oldest.expert] if oldest.expert in loads else _serve(oldest.expert, waiting, limits)
    here = [name for name in state.resident if name in groups]
    if here:
        return _serve(max(here, key=lambda name: (len(groups[name]), name)), waiting, limits)
    due_s = {name: _due_s(load, groups[name], experts, state, expected, now_s, limits) for name, load in loads.items()}
    due = [name for name in loads if due_s[name] <= now_s]
    if not due:
        return Wait(until_s=min(due_s.values()))
    return loads[max(due, key=lambda name: (len(groups[name]) / _cost_s(experts[name], state), name))]


def load_over(order: Sequence[str], wanted: str, experts: Mapping[str, TierExpert], state: TierState, limits: TierLimits) -> Load:
    """Load ``wanted``, evicting residents in this ``order`` until there is room."""
    used = sum(experts[name].memory_bytes for name in state.resident)
    evict = []
    for name in order:
        if used + experts[wanted].memory_bytes <= limits.resident_bytes:
            break
        evict.append(name)
        used -= experts[name].memory_bytes
    tier = tier_of(wanted, state)
    if tier is not Tier.DISK:
        return Load(expert=wanted, evict=tuple(evict), from_tier=tier)
    # Copies that nobody could load from soon give way; those of absent experts are worth more than a resident's.
    idle = [name for name in state.host if name in state.resident and name not in evict]
    drop = _drops(idle, wanted, experts, state, limits)
    return Load(expert=wanted, evict=tuple(evict), from_tier=tier, keep=drop is not None, drop=drop or ())


def prefetch(
    experts: Mapping[str, TierExpert],
    state: TierState,
    waiting: Sequence[Waiting],
    expected: Mapping[str, float],
    limits: TierLimits,
) -> Prefetch | None:
    """The copy that is worth making beside what goes on: of the absent expert with the most waiting, then the most expected."""
    groups = _groups(waiting)

    def worth(name: str) -> tuple[float, float]:
        return len(groups.get(name, ())), expected.get(name, 0.0)

    absent = [name for name in sorted(experts) if tier_of(name, state) is Tier.DISK and max(worth(name)) > 0.0]
    if not absent:
        return None
    likely = max(absent, key=worth)
    resident = [name for name in state.host if name in state.resident]
    others = sorted((name for name in state.host if name not in state.resident), key=worth)
    drop = _drops([*resident, *(name for name in others if worth(name) < worth(likely))], likely, experts, state, limits)
    return None if drop is None else Prefetch(expert=likely, drop=drop)


def after(action: Action | Prefetch, state: TierState) -> TierState:
    """The state that an action leaves behind; who is busy is not its matter."""
    match action:
        case Wait():
            return state
        case Serve(expert=name):
            others = tuple(other for other in state.resident if other != name)
            return TierState(resident=(*others, name), host=state.host)
        case Load(expert=name, evict=evict, keep=keep, drop=drop):
            resident = (*(other for other in state.resident if other not in evict), name)
            host = tuple(other for other in state.host if other not in drop)
            return TierState(resident=resident, host=(*host, name) if keep else host)
        case Prefetch(expert=name, drop=drop):
            return TierState(resident=state.resident, host=(*(other for other in state.host if other not in drop), name))


def _due_s(
    load: Load,
    group: Sequence[Waiting],
    experts: Mapping[str, TierExpert],
    state: TierState,
    expected: Mapping[str, float],
    now_s: float,
    limits: TierLimits,
) -> float:
    """When a load is worth it: now or before, or a moment to come."""
    evicted_rate = sum(expected.get(name, 0.0) for name in load.evict)
    soon_s = _SOON * sum(experts[name].fetch_s + experts[name].load_s for name in load.evict)
    wanted_back = 1.0 - math.exp(-evicted_rate * soon_s)
    worth_s = limits.load_wait_factor * _cost_s(experts[load.expert], state) * wanted_back
    waited_s = sum(max(0.0, now_s - request.arrival_s) for request in group)
    if waited_s >= worth_s:
        return now_s
    fair_s = min(request.arrival_s for request in group) + limits.fairness_window_s
    # Their sum grows by one second per second and request; a little more, so that rounding never makes it due a moment too early.
    return min(fair_s, now_s + (worth_s - waited_s) / len(group) + 1e-6)


def _groups(waiting: Sequence[Waiting]) -> dict[str, list[Waiting]]:
    groups: dict[str, list[Waiting]] = {}
    for request in waiting:
        groups.setdefault(request.expert, []).append(request)
    return groups


def _serve(expert: str, waiting: Sequence[Waiting], limits: TierLimits) -> Serve:
    mine = sorted((w for w in waiting if w.expert == expert), key=lambda w: (w.arrival_s, w.request_id))
    return Serve(expert=expert, request_ids=tuple(w.request_id for w in mine[: limits.max_group]))


def _cost_s(expert: TierExpert, state: TierState) -> float:
    fetch_s = 0.0 if expert.name in state.host else expert.fetch_s
    return max(1e-9, fetch_s + expert.load_s)


def _drops(
    order: Sequence[str], wanted: str, experts: Mapping[str, TierExpert], state: TierState, limits: TierLimits
) -> tuple[str, ...] | None:
    """The copies to drop, in this order, for one of ``wanted``; None when even all of them don't make room."""
    used = sum(experts[name].host_bytes for name in state.host) + experts[wanted].host_bytes
    drop = []
    for name in order:
        if used <= limits.host_bytes:
            break
        drop.append(name)
        used -= experts[name].host_bytes
    return tuple(drop) if used <= limits.host_bytes else None
