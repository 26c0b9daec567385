"""Simulates a planned deployment under arrivals, failures and stragglers: latency percentiles and goodput (control speed).

Must not know: how the plan was found.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from antiphon.core.errors import InvalidInput
from antiphon.planner.bounds import checked
from antiphon.planner.options import Option, Planner, colocated_chunk
from antiphon.planner.pipeline.group import Contexts, DecodeModel, Layout
from antiphon.planner.simulation.decode_group import Request
from antiphon.planner.simulation.event_loop import EventLoop, Fault, Service
from antiphon.planner.traffic import Traffic

QUANTILES = (50.0, 90.0, 95.0, 99.0)
MAX_REQUESTS = 20_000_000  # what memory of a laptop holds
NUM_ROWS, NUM_CONTEXTS = 24, 24  # grid of the step-time table


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationInput:
    """What to simulate besides the plan."""

    rate: float | None = None  # requests per second; None = the trace's own arrivals
    duration_s: float = 600.0
    warm_up_s: float = 60.0  # requests that arrive earlier aren't counted
    faults: tuple[Fault, ...] = ()
    failures_per_card_hour: float = 0.0  # drawn at random over attention, FFN and prefill cards
    repair_s: float = 120.0  # an attention or prefill worker is away for this long
    ffn_failover_s: float = 1.0  # a group waits this long for another replica of a lost FFN shard
    stragglers_per_card_hour: float = 0.0
    straggle_s: float = 30.0
    straggle_factor: float = 1.5
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What was seen between the warm-up and the end."""

    duration_s: float
    num_requests: int  # arrived
    num_finished: int
    goodput: float  # requests per second that kept both targets
    within_slo: float  # share of the finished that kept both targets
    tokens_per_s: float  # of finished requests
    ttft_quantiles_s: tuple[tuple[float, float], ...]  # percentile, seconds
    tpot_quantiles_s: tuple[tuple[float, float], ...]
    num_reprefilled: int
    mean_batch: float  # per decode worker, over the whole time
    num_events: int

    def ttft_s(self, percentile: float) -> float:
        """Time to first token at one of the percentiles."""
        return dict(self.ttft_quantiles_s)[percentile]

    def tpot_s(self, percentile: float) -> float:
        """Time per output token at one of the percentiles."""
        return dict(self.tpot_quantiles_s)[percentile]


def simulate_option(planner: Planner, option: Option, inputs: SimulationInput) -> SimulationResult:
    """Run the option's pools.

    Raises:
        InvalidInput: there is neither a rate nor a trace with arrivals, or the warm-up leaves nothing.
    """
    for name, value in (
        ("duration_s", inputs.duration_s),
        ("warm_up_s", inputs.warm_up_s),
        ("failures", inputs.failures_per_card_hour),
        ("repair_s", inputs.repair_s),
        ("failover_s", inputs.ffn_failover_s),
        ("stragglers", inputs.stragglers_per_card_hour),
        ("straggle_factor", inputs.straggle_factor),
        ("seed", inputs.seed),
    ):
        checked(name, value)
    expected = (inputs.rate or 0.0) * inputs.duration_s
    if expected > MAX_REQUESTS:
        raise InvalidInput(f"{expected:.3g} requests are more than {MAX_REQUESTS:,} to simulate; shorten duration_s", "duration_s")
    if inputs.warm_up_s >= inputs.duration_s:
        raise InvalidInput(
            f"warm_up_s: a warm-up of {inputs.warm_up_s:g} s leaves nothing of the {inputs.duration_s:g} s of duration_s",
            "warm_up_s",
        )
    requests = arrivals(planner.demand.traffic, inputs)
    layout, pool = option.point.layout, option.prefill
    num_prefill = layout.num_cards * option.num_groups if pool is None else pool.num_instances
    loop = EventLoop(
        requests,
        num_prefill=num_prefill,
        num_groups=option.num_groups,
        workers_per_group=layout.num_ranks,
        slots_per_worker=option.point.batch,
        service=service_of(planner, option),
        faults=sorted([*inputs.faults, *random_faults(option, num_prefill, inputs)], key=lambda fault: fault.at_s),
        until_s=inputs.duration_s,
        seed=inputs.seed,
    )
    loop.run()
    return _result(requests, planner, inputs, loop)


def arrivals(traffic: Traffic, inputs: SimulationInput) -> list[Request]:
    """Poisson arrivals at the rate, or the trace's own, repeated to the end of the simulated time."""
    shapes = traffic.requests
    if inputs.rate is None:
        if any(shape.arrival_s is None for shape in shapes):
            raise InvalidInput("give a rate of requests, or a trace with arrival_s", "rate")
        ordered = sorted(shapes, key=lambda shape: shape.arrival_s or 0.0)
        first, last = ordered[0].arrival_s or 0.0, ordered[-1].arrival_s or 0.0
        period = (last - first) * len(ordered) / max(1, len(ordered) - 1) or inputs.duration_s
        found: list[Request] = []
        for repeat in range(math.ceil(inputs.duration_s / period)):
            for shape in ordered:
                at_s = repeat * period + (shape.arrival_s or 0.0) - first
                found.append(Request(index=len(found), prompt=shape.prompt_tokens, output=shape.output_tokens, arrival_s=at_s))
        return found
    rng = np.random.default_rng(inputs.seed)
    count = int(inputs.rate * inputs.duration_s + 6 * math.sqrt(inputs.rate * inputs.duration_s) + 10)
    times = np.cumsum(rng.exponential(1 / inputs.rate, size=count))
    weights = np.array([shape.weight for shape in shapes])
    kinds = rng.choice(len(shapes), size=count, p=weights / weights.sum())
    return [
        Request(index=index, prompt=shapes[kind].prompt_tokens, output=shapes[kind].output_tokens, arrival_s=float(at_s))
        for index, (at_s, kind) in enumerate(zip(times.tolist(), kinds.tolist(), strict=True))
        if at_s <= inputs.duration_s
    ]


def random_faults(option: Option, num_prefill: int, inputs: SimulationInput) -> list[Fault]:
    """Failures and stragglers as Poisson processes over the cards of each role."""
    rng, layout = random.Random(inputs.seed + 1), option.point.layout
    hours = inputs.duration_s / 3600
    roles = [
        ("attention", option.num_groups * layout.num_attention, inputs.repair_s),
        ("ffn", 0 if layout.colocated else option.num_groups * layout.num_ffn, inputs.ffn_failover_s),
        ("prefill", 0 if option.prefill is None else option.prefill.num_cards, inputs.repair_s),
    ]
    faults = []

    def draw(pool: str, per_hour: float, duration_s: float, factor: float) -> None:
        at_s = rng.expovariate(per_hour / 3600) if per_hour > 0 else math.inf
        while at_s < inputs.duration_s:
            faults.append(
                Fault(
                    at_s=at_s,
                    pool=pool,
                    duration_s=duration_s,
                    group=rng.randrange(option.num_groups),
                    worker=rng.randrange(num_prefill if pool == "prefill" else layout.num_ranks),
                    factor=factor,
                )
            )
            at_s += rng.expovariate(per_hour / 3600)

    if hours > 0:
        for pool, cards, duration_s in roles:
            draw(pool, cards * inputs.failures_per_card_hour, duration_s, 1.0)
        cards = option.num_groups * layout.num_cards
        draw("slow", cards * inputs.stragglers_per_card_hour, inputs.straggle_s, inputs.straggle_factor)
    return faults


def service_of(planner: Planner, option: Option) -> Service:
    """Service times of an option: its prefill instances, its KV links, its groups at every batch."""
    model, point = planner.decode_model(option.wiring, option.prompt_room), option.point
    prefill, pool = planner.prefill_model(), option.prefill
    if pool is None:  # chunks of prompts run beside decode rows
        chunk = colocated_chunk(point, planner.demand.traffic, option.prompt_room)
        prefill_s = _kept(lambda prompt: prompt / chunk * point.step_s)
        transfer_s: Callable[[int], float] = _kept(lambda prompt: 0.5 * point.step_s)
    else:
        net = model.stages.attention.nic_bandwidth
        layers, size = planner.shape.num_layers, pool.cards_per_instance
        prefill_s = _kept(lambda prompt: prefill.prompt_s(prompt, size))
        long_prompt = planner.demand.traffic.prompt_quantile(0.95)
        per_token_s = prefill.transfer_s(size, net) / long_prompt
        transfer_s = _kept(lambda prompt: max(0.0, prompt * per_token_s - prefill_s(prompt)) + prompt * per_token_s / layers)
    return Service(prefill_s=prefill_s, transfer_s=transfer_s, step_s=step_table(model, point.layout, point.batch))


def _kept(function: Callable[[int], float]) -> Callable[[int], float]:
    known: dict[int, float] = {}

    def lookup(prompt: int) -> float:
        value = known.get(prompt)
        if value is None:
            value = known[prompt] = function(prompt)
        return value

    return lookup


def step_table(model: DecodeModel, layout: Layout, slots: int) -> Callable[[float, float], float]:
    """Seconds of a step by rows and cached tokens of the fullest worker, interpolated on a grid of exact values. Where requests
    speculate, of a token: what a step brings comes evenly.

    The barrier is left out: the simulation finds the fullest worker itself.
    """
    contexts = model.contexts
    longest = max(contexts.mean + 4 * contexts.deviation, 2 * contexts.mean)
    row_grid = np.linspace(0, slots, NUM_ROWS + 1)
    context_grid = np.linspace(0, longest, NUM_CONTEXTS + 1)
    table: list[list[float]] = []
    for rows in row_grid:
        line = []
        for context in context_grid:
            exact = dataclasses.replace(
                model,
                contexts=Contexts(
                    mean=float(context),
                    prompt_rows_per_decode_row=contexts.prompt_rows_per_decode_row,
                    prompt=contexts.prompt,
                ),
            )
            line.append(exact.step(layout, max(float(rows), 1.0) / layout.num_ubatches)[0] / exact.speculation.tokens())
        table.append(line)
    row_scale, context_scale = NUM_ROWS / slots, NUM_CONTEXTS / longest

    def step_s(rows: float, tokens: float) -> float:
        x = rows * row_scale
        y = tokens / rows * context_scale if rows else 0.0
        i = min(int(x), NUM_ROWS - 1)
        j = min(int(y), NUM_CONTEXTS - 1)  # beyond the grid the last slope goes on
        u, v = x - i, y - j
        low, high = table[i], table[i + 1]
        return (1 - u) * (low[j] + v * (low[j + 1] - low[j])) + u * (high[j] + v * (high[j + 1] - high[j]))

    return step_s


def _result(requests: Sequence[Request], planner: Planner, inputs: SimulationInput, loop: EventLoop) -> SimulationResult:
    counted = [request for request in requests if request.arrival_s >= inputs.warm_up_s]
    finished = [request for request in counted if request.finish_s >= 0]
    ttft = np.array([request.first_s - request.arrival_s for request in finished])
    tpot = np.array([(r.finish_s - r.first_s) / (r.output - 1) if r.output > 1 else 0.0 for r in finished])
    kept = int(np.count_nonzero((ttft <= planner.demand.ttft_s) & (tpot <= planner.demand.tpot_s * (1 + 1e-9))))
    seconds = inputs.duration_s - inputs.warm_up_s
    # Throughput counts what finished in the window, whenever it arrived.
    done = [r for r in requests if inputs.warm_up_s <= r.finish_s]
    return SimulationResult(
        duration_s=inputs.duration_s,
        num_requests=len(counted),
        num_finished=len(finished),
        goodput=kept / seconds,
        within_slo=kept / len(finished) if finished else 0.0,
        tokens_per_s=sum(r.output for r in done) / seconds,
        ttft_quantiles_s=_quantiles(ttft),
        tpot_quantiles_s=_quantiles(tpot),
        num_reprefilled=loop.num_reprefilled,
        mean_batch=loop.mean_batch(),
        num_events=loop.num_events,
    )


def _quantiles(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[tuple[float, float], ...]:
    if not len(values):
        return tuple((q, math.nan) for q in QUANTILES)
    return tuple((q, float(np.percentile(values, q))) for q in QUANTILES)


def default_rate(planner: Planner, option: Option) -> float:
    """Requests per second at the share of full batches that plans aim at."""
    if planner.demand.rate is not None:
        return planner.demand.rate
    return planner.assumptions.fill * option.tokens_per_s / planner.demand.traffic.mean_output
