"""The plan of one deployment: every wiring at its best, the verdict, and each number's derivation (control speed).

Must not know: documents, terminals, or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from antiphon.core.errors import InvalidInput
from antiphon.planner.constraints import Violation, beyond, shortfall, violations
from antiphon.planner.cost.formula import Derivation
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.model_cost import ModelCost, model_cost
from antiphon.planner.cost.shape import FLOPS_PER_WEIGHT
from antiphon.planner.options import Option, Planner, Wiring
from antiphon.planner.pipeline.ratio import LinearTimes, optimal_ratio, optimal_ratio_with_barrier
from antiphon.planner.search import best_option
from antiphon.planner.verdict import FabricCheck, binding, choose, fabric_check, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm:
    """Attention cards for the AFD option's FFN cards, from linear stage times."""

    attention_cards: float
    attention_cards_with_barrier: int
    times: LinearTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to deploy. ``chosen`` is None when nothing is feasible; then ``failed`` says why, by wiring."""

    planner: Planner
    cost: ModelCost
    options: Mapping[Wiring, Option]
    failed: Mapping[Wiring, tuple[Violation, ...]]
    chosen: Option | None
    reason: str
    bindings: Mapping[Wiring, str]
    fabric: FabricCheck | None
    closed_form: ClosedForm | None

    @property
    def verdict(self) -> str:
        """colocated, pd or afd; infeasible; or not modelled, when a wiring fails by nothing but what the planner doesn't know."""
        if self.chosen is not None:
            return self.chosen.wiring.value
        return "not modelled" if "not modelled" in map(shortfall, self.failed.values()) else "infeasible"

    @property
    def roles(self) -> Mapping[str, tuple[int, Accelerator]]:
        """Cards of the chosen option by role."""
        if self.chosen is None:
            return {}
        option, cards = self.chosen, self.planner.cards
        layout, groups = option.point.layout, option.num_groups
        roles: dict[str, tuple[int, Accelerator]] = {}
        if option.prefill is not None:
            roles["prefill"] = (option.prefill.num_cards, cards.prefill)
        if option.wiring is Wiring.AFD:
            roles["attention"] = (groups * layout.num_attention, cards.attention)
            roles["ffn"] = (groups * layout.num_ffn, cards.ffn)
        elif option.wiring is Wiring.PD:
            roles["decode"] = (groups * layout.num_cards, cards.decode)
        else:
            roles["monolith"] = (groups * layout.num_cards, cards.colocated)
        return roles


def make_plan(planner: Planner) -> Plan:
    """Plan.

    Raises:
        InvalidInput: neither a budget nor a rate bounds the size of the deployment, or one is below 1.
    """
    demand = planner.demand
    if demand.budget_cards is None and demand.rate is None:
        raise InvalidInput("gpuBudget: give a budget of accelerators (--gpus), a rate of requests (--rate), or both", "gpuBudget")
    if demand.budget_cards is not None and demand.budget_cards < 1:
        raise InvalidInput(f"gpuBudget: a budget of {demand.budget_cards} accelerators is none", "gpuBudget")
    found = {wiring: best_option(planner, wiring) for wiring in Wiring}
    options = {wiring: option for wiring, option in found.items() if option is not None}
    failed = {wiring: violations(planner, wiring) for wiring, option in found.items() if option is None}
    chosen = choose(list(options.values())) if options else None
    why = _why_nothing(failed) if chosen is None else reason(planner, chosen, options, failed)
    afd = options.get(Wiring.AFD)
    return Plan(
        planner=planner,
        cost=model_cost(planner.shape, planner.formats, demand.traffic.mean_context),
        options=options,
        failed=failed,
        chosen=chosen,
        reason=why,
        bindings={wiring: binding(planner, option) for wiring, option in options.items()},
        fabric=fabric_check(planner, num_stages=3),
        closed_form=None if afd is None else _closed_form(planner, afd),
    )


def _why_nothing(failed: Mapping[Wiring, tuple[Violation, ...]]) -> str:
    by_text: dict[str, list[str]] = {}
    for wiring, found in failed.items():
        for violation in found:
            by_text.setdefault(violation.text, []).append(wiring.value)
    parts = [f"{', '.join(wirings)}: {text}" for text, wirings in by_text.items()]
    return "; ".join([*parts, *beyond(failed.values())])


def linear_times(planner: Planner, afd: Option) -> LinearTimes:
    """The AFD option's main kind of layer as linear functions of tokens and rows, around its batch."""
    model = planner.decode_model(Wiring.AFD)
    stages, point = model.stages, afd.point
    layer, rows, context = point.main.layer, point.computed_rows, model.contexts.mean
    full, empty = (stages.attention_s(layer, rows, seen, tensor=point.layout.tensor) for seen in (context, 0.0))
    all_rows, num_ffn = point.rows_per_ffn_ubatch, point.layout.num_ffn
    at, beyond = (stages.ffn_s(layer.ffn, r, num_ffn) for r in (all_rows, 2 * all_rows))
    computing = (
        FLOPS_PER_WEIGHT
        * layer.ffn.activated_weights
        / (num_ffn * stages.ffn.flops_in(stages.formats.compute) * stages.efficiency.compute)
    )
    slope = max((beyond - at) / all_rows, computing)  # while weight reads dominate, rows still cost their operations
    return LinearTimes(
        attention_per_token_s=(full - empty) / (rows * context),
        attention_fixed_s=empty,
        ffn_per_row_s=slope,
        ffn_fixed_s=max(at - slope * all_rows, 0.0),
        exchange_s=max(point.main.times.a2f_s, point.main.times.f2a_s),
    )


def _closed_form(planner: Planner, afd: Option) -> ClosedForm:
    times, rows = linear_times(planner, afd), afd.point.computed_rows
    contexts = planner.decode_model(Wiring.AFD).contexts
    return ClosedForm(
        attention_cards=optimal_ratio(times, rows, rows * contexts.mean),
        attention_cards_with_barrier=optimal_ratio_with_barrier(times, rows, contexts.mean, contexts.deviation),
        times=times,
    )


def explain(plan: Plan) -> Derivation:
    """Every number of the chosen option with its formula and values."""
    derivation = Derivation()
    planner = plan.planner
    context = planner.demand.traffic.mean_context
    model_cost(planner.shape, planner.formats, context, derivation.section(f"one decoded token at context {context:.0f}"))
    for wiring, option in plan.options.items():
        if plan.chosen is not None and wiring is not plan.chosen.wiring:
            continue
        point = option.point
        planner.decode_model(wiring, option.prompt_room).point(point.layout, point.rows, point.limit, derivation)
        if option.prefill is not None:
            rate = option.tokens_per_s / planner.demand.traffic.mean_output
            planner.prefill_model().pool(
                option.prefill.cards_per_instance,
                option.prefill.num_instances,
                rate,
                first_step_s=point.step_s,
                decode_net=planner.decode_model(wiring).stages.attention.nic_bandwidth,
                apply=derivation.section("prefill pool"),
            )
    return derivation


def finite(value: float) -> float | None:
    """The value, or None for an absent (infinite) one."""
    return value if math.isfinite(value) else None
