"""Plays traces of requests against the tier policy and against first-come with LRU eviction (control speed, offline).

One server, simulated time. Serving a group costs a base and a share per request; loading costs what the expert says. Both
policies batch neighbours of one expert the same way. Must not know: real clocks, real weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from antiphon.coe.tiers import (
    Action,
    Load,
    Prefetch,
    Serve,
    Tier,
    TierExpert,
    TierLimits,
    TierState,
    Waiting,
    after,
    plan,
    tier_of,
)

RATE_HALF_LIFE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How long serving takes."""

    base_s: float  # per group
    per_request_s: float

    def group_s(self, num_requests: int) -> float:
        """Seconds for a group."""
        return self.base_s + self.per_request_s * num_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a policy made of a trace."""

    num_served: int
    num_switches: int
    makespan_s: float  # until the last request is served
    load_s: float  # spent loading
    waits_s: tuple[float, ...]  # from arrival to the start of service, by request

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return self.num_served / self.makespan_s if self.makespan_s > 0 else math.inf


Policy = Callable[[Mapping[str, TierExpert], TierState, Sequence[Waiting], Mapping[str, float], float, TierLimits], Action | None]


def first_come(
    experts: Mapping[str, TierExpert],
    state: TierState,
    waiting: Sequence[Waiting],
    expected: Mapping[str, float],
    now_s: float,
    limits: TierLimits,
) -> Action | None:
    """Serve in order of arrival, neighbours of one expert together; evict the least recently used."""
    if not waiting:
        return None
    order = sorted(waiting, key=lambda w: (w.arrival_s, w.request_id))
    wanted = order[0].expert
    if wanted in state.resident:
        run: list[int] = []
        for request in order:
            if request.expert != wanted or len(run) == limits.max_group:
                break
            run.append(request.request_id)
        return Serve(expert=wanted, request_ids=tuple(run))
    used = sum(experts[name].memory_bytes for name in state.resident)
    evict = []
    for name in state.resident:
        if used + experts[wanted].memory_bytes <= limits.resident_bytes:
            break
        evict.append(name)
        used -= experts[name].memory_bytes
    return Load(expert=wanted, evict=tuple(evict), from_tier=tier_of(wanted, state))


def play(
    trace: Sequence[Waiting],
    experts: Mapping[str, TierExpert],
    limits: TierLimits,
    service: Service,
    policy: Policy = plan,
    start: TierState | None = None,
) -> Outcome:
    """Serve a whole trace; ``start`` None = everything on disk."""
    state = start if start is not None else TierState(resident=(), host=())
    arrivals = sorted(trace, key=lambda w: (w.arrival_s, w.request_id))
    waiting: dict[int, Waiting] = {}
    waits: dict[int, float] = {}
    rates = dict.fromkeys(experts, 0.0)
    now_s, seen_s, load_s, num_switches, next_arrival = 0.0, 0.0, 0.0, 0, 0
    while len(waits) < len(arrivals):
        while next_arrival < len(arrivals) and arrivals[next_arrival].arrival_s <= now_s:
            request = arrivals[next_arrival]
            _observe(rates, request, seen_s)
            seen_s = request.arrival_s
            waiting[request.request_id] = request
            next_arrival += 1
        action = policy(experts, state, list(waiting.values()), rates, now_s, limits)
        if action is None:
            now_s = arrivals[next_arrival].arrival_s
            continue
        match action:
            case Serve(request_ids=ids):
                for request_id in ids:
                    waits[request_id] = now_s - waiting.pop(request_id).arrival_s
                now_s += service.group_s(len(ids))
            case Load(expert=name, from_tier=tier):
                took = experts[name].load_s + (experts[name].fetch_s if tier is Tier.DISK else 0.0)
                now_s, load_s, num_switches = now_s + took, load_s + took, num_switches + 1
            case Prefetch():
                pass  # the copy into host memory runs beside serving
        state = after(action, experts, state, limits)
    return Outcome(
        num_served=len(waits),
        num_switches=num_switches,
        makespan_s=now_s,
        load_s=load_s,
        waits_s=tuple(waits[request.request_id] for request in trace),
    )


def _observe(rates: dict[str, float], request: Waiting, last_s: float) -> None:
    """Requests per second by expert, exponentially forgotten."""
    decay = 0.5 ** (max(0.0, request.arrival_s - last_s) / RATE_HALF_LIFE_S)
    for name in rates:
        rates[name] *= decay
    rates[request.expert] += math.log(2) / RATE_HALF_LIFE_S


def random_trace(names: Sequence[str], num_requests: int, rate: float, skew: float, stay: float, seed: int) -> list[Waiting]:
    """Poisson arrivals at ``rate`` a second; experts by Zipf's law with exponent ``skew``.

    A request repeats the expert before it with probability ``stay``.
    """
    source = random.Random(seed)
    weights = [1.0 / (rank + 1) ** skew for rank in range(len(names))]
    now_s, last, trace = 0.0, names[0], []
    for request_id in range(num_requests):
        now_s += source.expovariate(rate)
        if source.random() >= stay:
            last = source.choices(list(names), weights)[0]
        trace.append(Waiting(request_id=request_id, expert=last, arrival_s=now_s))
    return trace
