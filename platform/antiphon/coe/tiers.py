"""Which expert to load, serve or bring nearer next when not all fit in memory: a pure policy (request speed).

    disk ──fetch──► host memory ──load──► resident ──► serves        evicted experts fall back to host memory, then to disk

    1. a request older than the fairness window: its expert is next, whatever it costs
    2. requests at a resident expert: serve the largest group
    3. requests elsewhere: load the expert with the most to serve per second of loading, over the residents least expected
    4. nothing to serve: bring the likeliest absent expert into host memory

Must not know: how weights move, clocks, which engine serves.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Tier(enum.Enum):
    """Where an expert's weights are, nearest first."""

    RESIDENT = "resident"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierExpert:
    """What moving an expert costs."""

    name: str
    memory_bytes: int
    fetch_s: float  # disk to host memory
    load_s: float  # host memory to resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that waits for its expert."""

    request_id: int
    expert: str
    arrival_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    """Where everything is, least recently used first; an expert in neither tier is on disk."""

    resident: tuple[str, ...]
    host: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLimits:
    """Room and patience."""

    resident_bytes: int
    host_bytes: int
    fairness_window_s: float
    max_group: int  # requests served together
    prefetch: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Serve these requests together at a resident expert."""

    expert: str
    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Make an expert resident after evicting others."""

    expert: str
    evict: tuple[str, ...]
    from_tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Bring an expert from disk into host memory after dropping others from there."""

    expert: str
    drop: tuple[str, ...]


Action = Serve | Load | Prefetch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimes:
    """Measured stages of one load, in seconds."""

    evict_s: float
    fetch_s: float
    load_s: float

    @property
    def total_s(self) -> float:
        """All stages."""
        return self.evict_s + self.fetch_s + self.load_s


class ExpertLoader(Protocol):
    """Moves weights; one move at a time per pool."""

    async def load(self, action: Load, timeout_s: float) -> LoadTimes:
        """Evict and load. Raises DeadlineExceeded, Unavailable; what was resident before and is not evicted stays resident."""
        ...

    async def prefetch(self, action: Prefetch, timeout_s: float) -> float:
        """Bring into host memory; seconds it took. Raises DeadlineExceeded, Unavailable."""
        ...


def tier_of(expert: str, state: TierState) -> Tier:
    """Where an expert is."""
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
    """The next action; None when there is nothing to do. ``expected`` is the router's forecast: requests per second by expert."""
    oldest = min(waiting, key=lambda w: (w.arrival_s, w.request_id), default=None)
    if oldest is None:
        return _prefetch(experts, state, expected, limits)
    if now_s - oldest.arrival_s < limits.fairness_window_s:
        groups = _groups(waiting)
        here = [name for name in state.resident if name in groups]
        if here:
            return _serve(max(here, key=lambda name: (len(groups[name]), name)), waiting, limits)
        wanted = max(groups, key=lambda name: (len(groups[name]) / _cost_s(experts[name], state), name))
    else:
        wanted = oldest.expert
        if wanted in state.resident:
            return _serve(wanted, waiting, limits)
    evict = _evictions(experts, state, waiting, expected, wanted, limits)
    return Load(expert=wanted, evict=evict, from_tier=tier_of(wanted, state))


def after(action: Action, experts: Mapping[str, TierExpert], state: TierState, limits: TierLimits) -> TierState:
    """The state that an action leaves behind."""
    match action:
        case Serve(expert=name):
            others = tuple(other for other in state.resident if other != name)
            return TierState(resident=(*others, name), host=state.host)
        case Load(expert=name, evict=evict):
            resident = (*(other for other in state.resident if other not in evict), name)
            host = (*(other for other in state.host if other != name), *evict)
            return TierState(resident=resident, host=_fitting(host, experts, limits.host_bytes))
        case Prefetch(expert=name, drop=drop):
            return TierState(resident=state.resident, host=(*(other for other in state.host if other not in drop), name))


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


def _evictions(
    experts: Mapping[str, TierExpert],
    state: TierState,
    waiting: Sequence[Waiting],
    expected: Mapping[str, float],
    wanted: str,
    limits: TierLimits,
) -> tuple[str, ...]:
    """The residents to give up: those with the fewest waiting, then the least expected, then the least recently used."""
    groups = _groups(waiting)
    order = sorted(
        state.resident,
        key=lambda name: (len(groups.get(name, ())), expected.get(name, 0.0), state.resident.index(name)),
    )
    used = sum(experts[name].memory_bytes for name in state.resident)
    evict = []
    for name in order:
        if used + experts[wanted].memory_bytes <= limits.resident_bytes:
            break
        evict.append(name)
        used -= experts[name].memory_bytes
    return tuple(evict)


def _prefetch(
    experts: Mapping[str, TierExpert], state: TierState, expected: Mapping[str, float], limits: TierLimits
) -> Prefetch | None:
    absent = [name for name in sorted(experts) if tier_of(name, state) is Tier.DISK and expected.get(name, 0.0) > 0.0]
    if not limits.prefetch or not absent:
        return None
    likely = max(absent, key=lambda name: expected[name])
    used = sum(experts[name].memory_bytes for name in state.host)
    drop: list[str] = []
    for name in sorted(state.host, key=lambda other: (expected.get(other, 0.0), state.host.index(other))):
        if used + experts[likely].memory_bytes <= limits.host_bytes:
            break
        if expected.get(name, 0.0) >= expected[likely]:
            return None  # what is there is at least as likely
        drop.append(name)
        used -= experts[name].memory_bytes
    if used + experts[likely].memory_bytes > limits.host_bytes:
        return None
    return Prefetch(expert=likely, drop=tuple(drop))


def _fitting(host: Sequence[str], experts: Mapping[str, TierExpert], host_bytes: int) -> tuple[str, ...]:
    """The most recent experts that fit."""
    kept: list[str] = []
    used = 0
    for name in reversed(host):
        if used + experts[name].memory_bytes <= host_bytes:
            kept.append(name)
            used += experts[name].memory_bytes
    return tuple(reversed(kept))
