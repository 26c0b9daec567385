"""Tenants take turns: a flood waits for itself. On a simulated clock, so that every run is the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from antiphon.core.errors import Overloaded
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams
from antiphon.core.step import KVEvents, ModelRunnerOutput, SchedulerOutput
from antiphon.engine.core import EngineCore
from antiphon.engine.fairness import FairQueue
from antiphon.engine.limits import SchedulerConfig
from antiphon.engine.request_state import RequestState
from antiphon.engine.scheduler import Scheduler
from antiphon.testing import FakeClock


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at_s: float
    name: str
    tenant: str
    num_prompt: int = 60
    num_output: int = 40


class TimedExecutor:
    """A step takes 20 ms, and 10 us for each token: a decode that reads its weights from memory."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.left: dict[RequestId, int] = {}
        self.loads: list[RequestId] = []

    def poll_kv(self) -> KVEvents:
        """Prompts of the step before are there: a prefill worker as fast as one may wish."""
        loaded, self.loads = self.loads, []
        return KVEvents(loaded=tuple(loaded))

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.loads += [load.request_id for load in step.kv_loads]
        for new in step.new_requests:
            self.left[new.request_id] = len(new.token_ids) - new.num_computed_tokens
        sampled = {}
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            self.left[request_id] -= num_tokens
            if self.left[request_id] == 0:
                sampled[request_id], self.left[request_id] = (1,), 1
        self.clock.advance(0.02 + 1e-5 * step.num_tokens)
        return ModelRunnerOutput(sampled_token_ids=sampled)


def request(
    name: str,
    tenant: str = "",
    *,
    at_s: float = 0.0,
    num_prompt: int = 4,
    num_output: int = 4,
    priority: int = 0,
    prefill_worker: str | None = None,
) -> Request:
    return Request(
        request_id=RequestId(name),
        # All different, so that no prefix is cached but a preempted request's own.
        prompt_token_ids=tuple(random.Random(name).randrange(1 << 30) for _ in range(num_prompt)),
        sampling=SamplingParams(max_tokens=num_output),
        arrival_s=at_s,
        tenant=tenant,
        priority=priority,
        prefill_worker=prefill_worker,
    )


def simulate(
    arrivals: Sequence[Arrival], *, named: bool = True, num_places: int = 16, is_remote: Callable[[Arrival], bool] = lambda _: False
) -> dict[str, float]:
    """Seconds to first token by request. Without names all are one tenant's. ``is_remote``: its prompt comes from elsewhere."""
    clock = FakeClock()
    config = SchedulerConfig(
        max_num_seqs=num_places,
        max_num_batched_tokens=256,
        max_queued_requests=64,
        max_model_len=256,
        block_size_tokens=16,
        num_blocks=160,
        remote_prefill_min_tokens=16,
    )
    first: dict[str, float] = {}
    due = sorted(arrivals, key=lambda arrival: arrival.at_s)
    at = {arrival.name: arrival.at_s for arrival in due}

    def take(outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if output.new_token_ids:
                first.setdefault(output.request_id, clock() - at[output.request_id])

    scheduler = Scheduler(config, clock)
    core = EngineCore(scheduler, TimedExecutor(clock), take)
    start_s = clock()
    at = {name: start_s + at_s for name, at_s in at.items()}
    index = 0
    while index < len(due) or scheduler.has_requests or core.has_inbox:
        while index < len(due) and at[due[index].name] <= clock():
            a = due[index]
            tenant = a.tenant if named else ""
            sizes = {"num_prompt": a.num_prompt, "num_output": a.num_output}
            elsewhere = "prefill/0" if is_remote(a) else None
            core.submit(request(a.name, tenant, at_s=at[a.name], prefill_worker=elsewhere, **sizes))
            index += 1
        if not scheduler.has_requests and not core.has_inbox:
            clock.advance(at[due[index].name] - clock())
            continue
        core.step()
    return first


def poisson(tenant: str, rate: float, seconds: float, seed: int) -> list[Arrival]:
    chance, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        found.append(Arrival(at_s=at_s, name=f"{tenant}{len(found)}", tenant=tenant))
    return found


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def test_a_flood_of_ten_times_does_not_make_another_tenant_wait() -> None:
    calm, flood = poisson("calm", 2.0, 25.0, 1), poisson("flood", 20.0, 25.0, 2)
    alone = [first for name, first in simulate(calm).items() if name.startswith("calm")]
    beside = [first for name, first in simulate([*calm, *flood]).items() if name.startswith("calm")]
    in_line = [first for name, first in simulate([*calm, *flood], named=False).items() if name.startswith("calm")]
    assert len(alone) == len(beside) == len(calm)  # and nobody of them is refused
    assert p99(in_line) > 5 * p99(alone)  # as it is where there are no tenants
    assert p99(beside) <= 1.2 * p99(alone)


@pytest.mark.parametrize("calm_is_remote", [True, False])
def test_prompts_that_were_computed_elsewhere_wait_in_turns_too(*, calm_is_remote: bool) -> None:
    """All of the flood's prompts come back with their KV and need but a place: they are no line that another stands behind."""
    calm, flood = poisson("calm", 1.0, 25.0, 1), poisson("flood", 10.0, 25.0, 2)

    def is_remote(arrival: Arrival) -> bool:
        return calm_is_remote or arrival.tenant == "flood"

    alone = [first for name, first in simulate(calm, num_places=4, is_remote=is_remote).items()]
    beside = [
        first for name, first in simulate([*calm, *flood], num_places=4, is_remote=is_remote).items() if name.startswith("calm")
    ]
    assert len(alone) == len(beside) == len(calm)
    assert p99(beside) <= 1.2 * p99(alone)


def test_a_light_tenant_has_its_bursts_served_at_once_and_a_heavy_one_has_not() -> None:
    """Four places: more than half of them, while what it asks for over a while stays far below its share."""
    flood = poisson("flood", 10.0, 60.0, 2)
    bursts = [Arrival(at_s=10.0 + 15 * n, name=f"calm{n}.{k}", tenant="calm") for n in range(3) for k in range(4)]
    first = simulate([*bursts, *flood], num_places=4)
    assert max(first[each.name] for each in bursts) < 0.15  # a few steps; an answer holds its place for 0.8 s
    steady = [Arrival(at_s=10.0 + 0.25 * n, name=f"greedy{n}", tenant="greedy") for n in range(100)]
    beside = simulate([*steady, *flood], num_places=4)
    assert p99([beside[each.name] for each in steady]) > 1.0  # four a second are all that four places give
    assert len([name for name in beside if name.startswith("flood")]) > 40  # and the others' half is theirs


def test_who_asks_for_less_than_its_share_is_served_as_if_alone_near_the_share_too() -> None:
    """Half of what four places give is a tenant's share, 2.5 a second; the flood takes what is left."""
    calm, flood = poisson("calm", 1.3, 200.0, 5), poisson("flood", 13.0, 200.0, 6)
    alone = [first for name, first in simulate(calm, num_places=4).items() if name.startswith("calm")]
    beside = simulate([*calm, *flood], num_places=4)
    ours = [first for name, first in beside.items() if name.startswith("calm")]
    assert len(alone) == len(ours) == len(calm)
    assert p99(ours) <= 1.2 * p99(alone) + 0.04  # a step in progress, and one that is longer
    assert len(beside) - len(ours) > 0.85 * (200 * 5 - len(calm))  # and the engine does no less


def test_tenants_that_ask_for_all_they_can_get_are_equals_and_cost_each_other_no_steps() -> None:
    """Who is a little behind by chance takes a place, and what its owner had is not computed anew."""
    scheduler, core, outputs = engine(max_num_seqs=3, max_queued_requests=500)
    for number in range(200):
        for tenant in "ab":
            core.submit(request(f"{tenant}{number}", tenant, at_s=number, num_prompt=20, num_output=30))
    while scheduler.has_requests or core.has_inbox:
        core.step()
    ends = [output.request_id[0] for output in outputs if output.finish_reason is FinishReason.LENGTH]
    assert len(ends) == 400
    for at in range(60, 400, 20):
        assert 0.4 <= ends[:at].count("a") / at <= 0.6
    assert core.num_steps < 1.02 * 400 * 30 / 3


def test_the_least_served_tenant_is_next_and_its_own_order_holds_within() -> None:
    queue, states = FairQueue(), {}
    asked = [("a1", "a", 0), ("a2", "a", 0), ("a0", "a", -5), ("b1", "b", 9), ("b2", "b", 9)]
    for at_s, (name, tenant, priority) in enumerate(asked):
        states[name] = RequestState(request(name, tenant, at_s=float(at_s), priority=priority))
        queue.add(states[name])
    order = []
    while len(queue):
        head = queue.head()
        order.append(head.request_id)
        queue.take(head, 10)
    # A priority is a tenant's own affair: it does not pass another tenant.
    assert order == ["a0", "b1", "a1", "b2", "a2"]


def test_idling_saves_nothing_up() -> None:
    queue = FairQueue()

    def add(name: str, tenant: str) -> RequestState:
        state = RequestState(request(name, tenant))
        queue.add(state)
        return state

    first = add("b0", "b")
    queue.take(first, 10)
    for number in range(3):
        queue.take(add(f"a{number}", "a"), 1000)
    add("a", "a")
    add("b", "b")  # was away while a was served 3000 tokens
    heads = []
    for number in range(6):
        head = queue.head()
        heads.append(head.request.tenant)
        queue.take(head, 100)
        add(f"{number}", head.request.tenant)
    assert heads.count("b") == 3


def engine(**limits: int) -> tuple[Scheduler, EngineCore, list[RequestOutput]]:
    clock, outputs = FakeClock(), []
    config = SchedulerConfig(
        **{
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "max_queued_requests": 4,
            "max_model_len": 64,
            "block_size_tokens": 4,
            "num_blocks": 64,
            **limits,
        }
    )
    scheduler = Scheduler(config, clock)
    return scheduler, EngineCore(scheduler, TimedExecutor(clock), outputs.extend), outputs


def test_a_full_queue_makes_way_for_who_has_less_in_it() -> None:
    scheduler, _, _ = engine()
    for number in range(4):
        scheduler.add(request(f"a{number}", "a", at_s=number))
    with pytest.raises(Overloaded):
        scheduler.add(request("a4", "a", at_s=4))
    scheduler.add(request("b0", "b", at_s=5))
    scheduler.add(request("b1", "b", at_s=6))
    with pytest.raises(Overloaded):  # two and two: nobody has more
        scheduler.add(request("b2", "b", at_s=7))
    ended = {output.request_id: output for output in scheduler.take_outputs()}
    assert set(ended) == {"a3", "a2"}
    for output in ended.values():
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None
        assert output.error.code == "overloaded"


def test_long_prompts_of_one_tenant_leave_another_its_part_of_every_step() -> None:
    limits = {"max_model_len": 4096, "num_blocks": 4096, "max_queued_requests": 64}
    scheduler, core, outputs = engine(**limits)
    for number in range(8):  # four run, and each is thirty steps long
        core.submit(request(f"a{number}", "a", at_s=number, num_prompt=2000, num_output=8))
    for _ in range(3):
        core.step()
    core.submit(request("b", "b", at_s=10.0, num_prompt=40, num_output=3))
    at = core.num_steps
    core.step()  # its prompt, alone
    assert [output.request_id for output in outputs if output.new_token_ids] == ["b"]
    for _ in range(4):  # then it decodes beside prompts that would fill the step
        core.step()
    assert core.num_steps == at + 5
    tokens = Counter(output.request_id for output in outputs for _ in output.new_token_ids)
    assert tokens["b"] == 3
    assert not {output.request_id for output in outputs if output.error is not None}
    a = sum(state.num_computed_tokens for name, state in scheduler._states.items() if name.startswith("a"))
    assert a == 7 * 64 - 2  # what b did not need of the steps in which it decoded went to a


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 64, "num_blocks": 16}])
def test_who_fills_the_batch_gives_places_up_to_half_and_no_token_is_lost(limits: dict[str, int]) -> None:
    scheduler, core, outputs = engine(**limits)
    for number in range(4):
        core.submit(request(f"a{number}", "a", at_s=number, num_prompt=8, num_output=8))
    core.step()
    for number in range(4):
        core.submit(request(f"b{number}", "b", at_s=10 + number, num_prompt=8, num_output=8))
    core.step()
    started = {output.request_id for output in outputs if output.new_token_ids}
    assert {"b0", "b1"} <= started
    assert 1 <= scheduler.stats.num_preemptions <= 2
    for _ in range(200):
        core.step()
    assert not scheduler.has_requests
    counts = Counter({f"{tenant}{number}": 0 for tenant in "ab" for number in range(4)})
    for output in outputs:
        counts[output.request_id] += len(output.new_token_ids)
    assert set(counts.values()) == {8}
    assert scheduler.blocks.num_free_blocks == scheduler.config.num_blocks
