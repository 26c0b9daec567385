"""Plays traces of requests against the tier policy and against first-come with LRU eviction (control speed, offline).

One server, simulated time. Serving a group costs a base and a share per request; loading costs what the expert says. Both
policies batch neighbours of one expert the same way. Must not know: real clocks, real weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antiphon.coe.tiers.forecast import Forecast
from antiphon.coe.tiers.policy import (
    Action,
    Load,
    Policy,
    Prefetch,
    Serve,
    Tier,
    TierExpert,
    TierLimits,
    TierState,
    Wait,
    Waiting,
    after,
    load_over,
    plan,
    prefetch,
)


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
    return load_over(state.resident, wanted, experts, state, limits)


def play(
    trace: Sequence[Waiting],
    experts: Mapping[str, TierExpert],
    limits: TierLimits,
    service: Service,
    policy: Policy = plan,
    start: TierState | None = None,
    with_prefetch: bool = False,
) -> Outcome:
    """Serve a whole trace; ``start`` None = everything on disk. With prefetch, copies are made beside serving."""
    state = start if start is not None else TierState(resident=(), host=())
    arrivals = sorted(trace, key=lambda w: (w.arrival_s, w.request_id))
    waiting: dict[int, Waiting] = {}
    waits: dict[int, float] = {}
    forecast = Forecast()
    copying: tuple[float, Prefetch] | None = None  # when it is done, and what
    now_s, load_s, num_switches, next_arrival = 0.0, 0.0, 0, 0
    while len(waits) < len(arrivals):
        while next_arrival < len(arrivals) and arrivals[next_arrival].arrival_s <= now_s:
            request = arrivals[next_arrival]
            forecast.observe({request.expert: 1.0}, request.arrival_s)
            waiting[request.request_id] = request
            next_arrival += 1
        if copying is not None and copying[0] <= now_s:
            state, copying = after(copying[1], state), None
        queue, expected = list(waiting.values()), forecast.expected(now_s)
        action = policy(experts, state, queue, expected, now_s, limits)
        copy = prefetch(experts, state, queue, expected, limits) if with_prefetch and copying is None else None
        if copy is not None and not (isinstance(action, Load) and copy.expert == action.expert):
            state = TierState(resident=state.resident, host=tuple(name for name in state.host if name not in copy.drop))
            copying = now_s + experts[copy.expert].fetch_s, copy
        match action:
            case None | Wait():
                ends = [action.until_s] if isinstance(action, Wait) else []
                ends += [arrivals[next_arrival].arrival_s] if next_arrival < len(arrivals) else []
                ends += [copying[0]] if copying is not None else []
                now_s = max(now_s, min(ends))
                continue
            case Serve(request_ids=ids):
                for request_id in ids:
                    waits[request_id] = now_s - waiting.pop(request_id).arrival_s
                now_s += service.group_s(len(ids))
            case Load(expert=name, from_tier=tier):
                took = experts[name].load_s
                if copying is not None and copying[1].expert == name:  # its copy is on the way: wait for it
                    took += copying[0] - now_s
                    state, copying = after(copying[1], state), None
                    action = load_over(action.evict, name, experts, state, limits)
                elif tier is Tier.DISK:
                    took += experts[name].fetch_s
                now_s, load_s, num_switches = now_s + took, load_s + took, num_switches + 1
        state = after(action, state)
    return Outcome(
        num_served=len(waits),
        num_switches=num_switches,
        makespan_s=now_s,
        load_s=load_s,
        waits_s=tuple(waits[request.request_id] for request in trace),
    )


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
