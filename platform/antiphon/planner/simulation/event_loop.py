"""The discrete-event loop: requests through a prefill pool and decode groups, with failures and stragglers (control speed).

Decode groups are simulated step by step in effect, but in bursts: between two changes of a group's batch its steps are alike, so
the loop jumps from change to change. A plain heap carries the events: an hour of 500 requests/s has 1.8 million requests, and
a library of simulated processes (simpy) took more than twice as long for the queues alone as this takes with every step.

    arrival ──► prefill queue ──► instance ──► KV moves ──► waiting ──► slot of a decode worker ──► finished
                    ▲                                                        │
                    └───────── its worker died: prompt + emitted tokens ─────┘

Must not know: where service times come from.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antiphon.planner.simulation.decode_group import DecodeGroup, Request

BURST_STEPS = 64  # steps before a group's step time is looked at again
FULL_COMPARISON = 16  # changes of a group's batch between two comparisons of all its workers


# What an event does: called with the time, an index and a version that tells stale events apart.
Action = Callable[[float, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A failure or slowdown of one worker.

    ``pool`` prefill: an instance is away and its prompt starts again elsewhere. attention: worker ``worker`` of group ``group``
    is away, its requests are prefilled again with what they had emitted. ffn: the group waits for a replacement and loses
    nothing. slow: the group's steps take ``factor`` times as long.
    """

    at_s: float
    pool: str
    duration_s: float
    group: int = 0
    worker: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How long things take."""

    prefill_s: Callable[[int], float]  # of a prompt length
    transfer_s: Callable[[int], float]  # KV of a prompt length
    step_s: Callable[[float, float], float]  # of rows and of cached tokens on a group's fullest worker


class EventLoop:
    """Runs requests to the end of the simulated time. Not reusable."""

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        num_prefill: int,
        num_groups: int,
        workers_per_group: int,
        slots_per_worker: int,
        service: Service,
        faults: Sequence[Fault] = (),
        until_s: float,
        seed: int = 0,
    ) -> None:
        self._requests = requests
        self._slots = slots_per_worker
        self._service = service
        self._until_s = until_s
        self._random = random.Random(seed)
        self._groups = [DecodeGroup(workers_per_group) for _ in range(num_groups)]
        self._idle_prefill = list(range(num_prefill))
        self._prefilling: list[Request | None] = [None] * num_prefill
        self._prefill_version = [0] * num_prefill
        self._prefill_alive = [True] * num_prefill
        self._prefill_queue: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._events: list[tuple[float, int, Action, int, int]] = []
        self._moving: dict[int, Request] = {}  # between prefill and decode
        self._faults = faults
        self._ties = 0
        self.num_reprefilled = 0
        self.num_events = 0
        self._batch_area = 0.0

    def run(self) -> None:
        """Process events until the simulated time is over."""
        for index, fault in enumerate(self._faults):
            self._push(fault.at_s, self._fault, index, 0)
        arrivals = iter(self._requests)
        upcoming = next(arrivals, None)
        while True:
            if upcoming is not None and (not self._events or upcoming.arrival_s <= self._events[0][0]):
                if upcoming.arrival_s > self._until_s:
                    return
                self.num_events += 1
                self._prefill_queue.append(upcoming)
                self._start_prefills(upcoming.arrival_s)
                upcoming = next(arrivals, None)
                continue
            if not self._events:
                return
            now, _, action, index, version = heapq.heappop(self._events)
            if now > self._until_s:
                return
            self.num_events += 1
            action(now, index, version)

    def mean_batch(self) -> float:
        """Requests running on a decode worker on average over the simulated time."""
        workers = sum(len(group.counts) for group in self._groups)
        return self._batch_area / (self._until_s * workers)

    def _wake(self, now: float, index: int, version: int) -> None:
        group = self._groups[index]
        if group.version == version:
            self._batch_area += (now - group.clock_s) * group.load
            group.step, group.clock_s = group.wake_step, now
            self._settle(index, now)

    def _prefill_done(self, now: float, index: int, version: int) -> None:
        if self._prefill_version[index] != version:
            return
        request = self._prefilling[index]
        assert request is not None
        self._prefilling[index] = None
        self._idle_prefill.append(index)
        delay = self._service.transfer_s(request.prompt + request.emitted)
        self._moving[request.index] = request
        self._push(now + delay, self._kv_arrived, request.index, 0)
        self._start_prefills(now)

    def _kv_arrived(self, now: float, index: int, _version: int) -> None:
        request = self._moving.pop(index)
        if self._waiting or not self._admit(request, now):
            self._waiting.append(request)

    def _push(self, at_s: float, action: Action, index: int, version: int) -> None:
        self._ties += 1
        heapq.heappush(self._events, (at_s, self._ties, action, index, version))

    def _start_prefills(self, now: float) -> None:
        while self._prefill_queue and self._idle_prefill:
            instance = self._idle_prefill.pop()
            if not self._prefill_alive[instance]:
                continue
            request = self._prefill_queue.popleft()
            self._prefilling[instance] = request
            self._prefill_version[instance] += 1
            done_s = now + self._service.prefill_s(request.prompt + request.emitted)
            self._push(done_s, self._prefill_done, instance, self._prefill_version[instance])

    # Decode groups.

    def _admit(self, request: Request, now: float) -> bool:
        index = self._pick_group()
        if index is None:
            return False
        self._advance(index, now)
        self._settle(index, now, joining=request)
        return True

    def _pick_group(self) -> int | None:
        """The emptier of two random groups with a free slot, or any with one."""
        count = len(self._groups)
        room = self._slots * len(self._groups[0].counts)
        first = int(self._random.random() * count)
        second = int(self._random.random() * count)
        if self._groups[second].load < self._groups[first].load:
            first = second
        if self._groups[first].load < room and self._free_worker(self._groups[first]) is not None:
            return first
        for index, group in enumerate(self._groups):
            if group.load < room and self._free_worker(group) is not None:
                return index
        return None

    def _free_worker(self, group: DecodeGroup) -> int | None:
        """The worker with the fewest rows, if it has a free slot."""
        heap = group.free
        while heap:
            count, worker = heap[0]
            if group.alive[worker] and group.counts[worker] == count:
                return worker if count < self._slots else None
            heapq.heappop(heap)
        return None

    def _advance(self, index: int, now: float) -> None:
        """Move a group to its last boundary that is not after ``now``; a step under way stays under way."""
        group = self._groups[index]
        if group.load == 0:
            group.clock_s = max(group.clock_s, now)
            return
        steps = int((now - group.clock_s) / group.step_s + 1e-9) if now > group.clock_s else 0
        if steps > 0:
            group.step += steps
            group.clock_s += steps * group.step_s
            self._batch_area += steps * group.step_s * group.load

    def _settle(self, index: int, now: float, joining: Request | None = None) -> None:
        """Finish what is due, let waiting requests and ``joining`` in at the next boundary, plan the next wake."""
        group = self._groups[index]
        while group.finishing and group.finishing[0][0] <= group.step:
            step, _, request = heapq.heappop(group.finishing)
            if request.group == index and request.joined_step + request.output - request.emitted == step:
                self._leave(group, request)
                request.finish_s = group.clock_s
                request.group = -1
        joined: Sequence[Request] = ()
        if joining is not None or self._waiting:
            joined = self._let_in(group, index, now, joining)
        if group.load == 0:
            group.version += 1
            return
        self._find_busiest(group, joined)
        busiest = group.busiest
        tokens = group.base[busiest] + group.counts[busiest] * group.step
        group.step_s = self._service.step_s(group.counts[busiest], tokens) * group.factor
        for request in joined:
            if request.first_s < 0:
                request.first_s = group.clock_s + group.step_s
        steps = min(BURST_STEPS, max(1, group.finishing[0][0] - group.step)) if group.finishing else BURST_STEPS
        group.version += 1
        group.wake_step = group.step + steps
        self._push(group.clock_s + steps * group.step_s, self._wake, index, group.version)

    def _let_in(self, group: DecodeGroup, index: int, now: float, joining: Request | None) -> list[Request]:
        self._next_boundary(group, now)
        joined: list[Request] = []
        while joining is not None or self._waiting:
            worker = self._free_worker(group)
            if worker is None:
                break
            request = joining if joining is not None else self._waiting.popleft()
            joining = None
            self._join(group, index, request, worker)
            joined.append(request)
        if joining is not None:
            self._waiting.appendleft(joining)
        return joined

    def _next_boundary(self, group: DecodeGroup, now: float) -> None:
        if group.load and now > group.clock_s:
            group.step += 1
            group.clock_s += group.step_s
            self._batch_area += group.step_s * group.load

    def _join(self, group: DecodeGroup, index: int, request: Request, worker: int) -> None:
        request.group, request.worker, request.joined_step = index, worker, group.step
        group.base[worker] += request.prompt + request.emitted - group.step
        group.counts[worker] += 1
        group.load += 1
        heapq.heappush(group.free, (group.counts[worker], worker))
        self._ties += 1
        heapq.heappush(group.finishing, (group.step + request.output - request.emitted, self._ties, request))

    def _leave(self, group: DecodeGroup, request: Request) -> None:
        worker = request.worker
        # A request that joined at step j with n tokens has n + (step - j) now: take its part out of the line.
        group.base[worker] -= request.prompt + request.emitted - request.joined_step
        group.counts[worker] -= 1
        group.load -= 1
        heapq.heappush(group.free, (group.counts[worker], worker))

    def _find_busiest(self, group: DecodeGroup, joined: Sequence[Request]) -> None:
        """The worker with the most cached tokens: all are compared now and then, in between only those that changed."""
        step, base, counts = group.step, group.base, group.counts
        if len(base) == 1:
            return
        if group.version % FULL_COMPARISON and counts[group.busiest]:
            most = base[group.busiest] + counts[group.busiest] * step
            for request in joined:
                tokens = base[request.worker] + counts[request.worker] * step
                if tokens > most:
                    group.busiest, most = request.worker, tokens
            return
        best, best_tokens = 0, -1
        for worker, (tokens, count) in enumerate(zip(base, counts, strict=True)):
            total = tokens + count * step
            if total > best_tokens:
                best, best_tokens = worker, total
        group.busiest = best

    # Faults.

    def _fault(self, now: float, index: int, _version: int) -> None:
        fault = self._faults[index]
        if fault.pool == "prefill":
            instance = fault.worker % len(self._prefilling)
            self._prefill_alive[instance] = False
            self._prefill_version[instance] += 1
            lost = self._prefilling[instance]
            self._prefilling[instance] = None
            if lost is not None:
                self._prefill_queue.appendleft(lost)
            self._push(now + fault.duration_s, self._repair, index, 0)
            self._start_prefills(now)
            return
        target = fault.group % len(self._groups)
        group = self._groups[target]
        self._advance(target, now)
        if fault.pool == "attention":
            self._lose_worker(group, target, fault.worker % len(group.counts))
            self._start_prefills(now)
        elif fault.pool == "ffn":
            group.clock_s = max(group.clock_s, now) + fault.duration_s
        else:
            group.factor *= fault.factor
        if fault.pool != "ffn":
            self._push(now + fault.duration_s, self._repair, index, 0)
        self._settle(target, now)

    def _lose_worker(self, group: DecodeGroup, target: int, worker: int) -> None:
        group.alive[worker] = False
        kept = []
        for entry in group.finishing:
            request = entry[2]
            if request.group != target or request.worker != worker:
                kept.append(entry)
                continue
            emitted = group.step - request.joined_step
            self._leave(group, request)
            request.group = -1
            if request.emitted == 0 and emitted <= 0:
                request.first_s = -1.0  # it died in its first step
            request.emitted += max(0, min(emitted, request.output - request.emitted - 1))
            self.num_reprefilled += 1
            self._prefill_queue.append(request)
        heapq.heapify(kept)
        group.finishing = kept

    def _repair(self, now: float, index: int, _version: int) -> None:
        fault = self._faults[index]
        if fault.pool == "prefill":
            instance = fault.worker % len(self._prefilling)
            if not self._prefill_alive[instance]:
                self._prefill_alive[instance] = True
                self._idle_prefill = [i for i in self._idle_prefill if i != instance] + [instance]
            self._start_prefills(now)
            return
        target = fault.group % len(self._groups)
        group = self._groups[target]
        self._advance(target, now)
        if fault.pool == "attention":
            worker = fault.worker % len(group.counts)
            group.alive[worker] = True
            heapq.heappush(group.free, (group.counts[worker], worker))
        else:
            group.factor /= fault.factor
        self._settle(target, now)
