"""Plans and costs as plain JSON values: what ``--json`` prints and other tools read (control speed).

Must not know: how anything was computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from antiphon.planner.calibration.fit import Comparison, FittedWiring
from antiphon.planner.constraints import Violation
from antiphon.planner.cost.formula import Derivation
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.library import Model
from antiphon.planner.cost.token_cost import TokenCost
from antiphon.planner.options import Option
from antiphon.planner.plan import Plan, finite
from antiphon.planner.simulation.deployment import SimulationResult

Json = dict[str, Any]


def cost_json(cost: TokenCost) -> Json:
    """The cost of one model at one context; field names are a contract."""
    model, row = cost.model, cost.model.decode
    colocated = cost.best_colocated
    return {
        "model": model.model,
        "context": model.context,
        "kv_bytes_per_token": row.kv_bytes,
        "attention_flops": row.attention_flops,
        "linear_flops": row.linear_flops,
        "ffn_flops": row.ffn_flops,
        "router_flops": row.router_flops,
        "head_flops": model.head_flops,
        "arithmetic_intensity": model.arithmetic_intensity,
        "kv_bytes_per_cached_token": model.kv_bytes_per_cached_token,
        "cache_bytes_per_request": model.cache_bytes,
        "prefill": dataclasses.asdict(model.prefill),
        "attention_usd_per_mtok": cost.attention,
        "ffn_usd_per_mtok": cost.ffn,
        "best": {
            "attention": cost.best_attention,
            "ffn": cost.best_ffn,
            "usd_per_mtok": cost.afd_usd,
            "colocated": {"hardware": colocated, "usd_per_mtok": cost.colocated_usd(colocated)},
        },
    }


def accelerator_json(card: Accelerator) -> Json:
    """An accelerator's figures."""
    return {field.name: getattr(card, field.name) for field in dataclasses.fields(card)} | {"flops": dict(card.flops)}


def option_json(option: Option, binding: str) -> Json:
    """One wiring at its best."""
    point, layout = option.point, option.point.layout
    prefill = option.prefill
    return {
        "wiring": option.wiring.value,
        "layout": layout.name,
        "attention_cards": layout.num_attention,
        "attention_tensor": layout.tensor,
        "ffn_cards": layout.num_ffn,
        "num_ubatches": layout.num_ubatches,
        "rows_per_ubatch": point.computed_rows,
        "speculation": None
        if not point.speculation.drafts
        else {"rows_per_request": point.speculation.rows, "tokens_per_step": point.speculation.tokens()},
        "batch_per_attention_card": point.batch / layout.tensor,
        "ffn_rows_per_ubatch": point.rows_per_ffn_ubatch,
        "num_groups": option.num_groups,
        "num_cards": option.num_cards,
        "idle_cards": {"cards": option.num_idle, "hardware": option.idle_card.key},
        "tokens_per_s": option.tokens_per_s,
        "tokens_per_s_per_card": option.tokens_per_s_per_card,
        "usd_per_hour": option.usd_per_hour,
        "usd_per_mtok": option.usd_per_mtok,
        "tpot_ms": option.tpot_s * 1e3,
        "ttft_ms": option.ttft_s * 1e3,
        "prompt_room": option.prompt_room if prefill is None else None,
        "binding": binding,
        "memory": {
            "attention_card_bytes": point.attention_bytes,
            "ffn_card_bytes": point.ffn_bytes,
        },
        "layers": [
            {
                "count": kind.count,
                "t_attention_us": kind.times.attention_s * 1e6,
                "t_ffn_us": kind.times.ffn_s * 1e6,
                "t_a2f_us": kind.times.a2f_s * 1e6,
                "t_f2a_us": kind.times.f2a_s * 1e6,
                "exchange_bytes_per_node": kind.exchange.node_bytes,
            }
            for kind in point.kinds
        ],
        "prefill": None
        if prefill is None
        else {
            "hardware": prefill.card.key,
            "cards_per_instance": prefill.cards_per_instance,
            "num_instances": prefill.num_instances,
            "num_cards": prefill.num_cards,
            "load": prefill.load,
            "mean_prefill_ms": prefill.mean_prefill_s * 1e3,
            "wait_p95_ms": prefill.wait_s * 1e3,
        },
        "prefill_decode_ratio": option.prefill_decode_ratio,
    }


def violation_json(violation: Violation) -> Json:
    """A constraint that fails, and by how much."""
    return {
        "constraint": violation.constraint.value,
        "needed": finite(violation.needed),
        "available": finite(violation.available),
        "unit": violation.unit,
        "by": finite(violation.by),
        "modelled": violation.modelled,
        "text": violation.text,
    }


def plan_json(plan: Plan) -> Json:
    """The whole plan; field names are a contract."""
    planner, demand = plan.planner, plan.planner.demand
    chosen = plan.chosen
    return {
        "model": planner.shape.name,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "demand": {
            "tpot_ms": None if finite(demand.tpot_s) is None else demand.tpot_s * 1e3,
            "ttft_ms": None if finite(demand.ttft_s) is None else demand.ttft_s * 1e3,
            "gpu_budget": demand.budget_cards,
            "requests_per_second": demand.rate,
            "mean_prompt_tokens": demand.traffic.mean_prompt,
            "mean_output_tokens": demand.traffic.mean_output,
            "mean_context_tokens": demand.traffic.mean_context,
        },
        "hardware": {role: getattr(planner.cards, role).key for role in ("colocated", "prefill", "decode", "attention", "ffn")},
        "roles": {role: {"cards": count, "hardware": card.key} for role, (count, card) in plan.roles.items()},
        "chosen": None if chosen is None else option_json(chosen, plan.bindings[chosen.wiring]),
        "options": {wiring.value: option_json(option, plan.bindings[wiring]) for wiring, option in plan.options.items()},
        "infeasible": {wiring.value: [violation_json(v) for v in found] for wiring, found in plan.failed.items()},
        "fabric": None
        if plan.fabric is None
        else {
            "sparsity": plan.fabric.sparsity,
            "min_sparsity": plan.fabric.min_sparsity,
            "feeds": plan.fabric.feeds,
            "rows_to_fill": plan.fabric.rows_to_fill,
        },
        "closed_form": None
        if plan.closed_form is None
        else {
            "attention_cards": plan.closed_form.attention_cards,
            "attention_cards_with_barrier": plan.closed_form.attention_cards_with_barrier,
        },
        "assumptions": {
            "efficiency": dataclasses.asdict(planner.assumptions.efficiency),
            "memory_share": planner.assumptions.memory_share,
            "expert_skew": planner.assumptions.expert_skew,
            "formats": dataclasses.asdict(planner.formats),
        },
    }


def derivation_json(derivation: Derivation) -> list[Json]:
    """Every step: formula, values with units, result."""
    return [
        {
            "section": step.section,
            "name": step.name,
            "meaning": step.prose,
            "formula": step.text,
            "values": {name: {"value": value, "unit": unit} for name, value, unit in step.values},
            "result": step.result,
            "unit": step.unit,
        }
        for step in derivation.steps
    ]


def simulation_json(result: SimulationResult) -> Json:
    """What a simulation saw."""
    return {
        "duration_s": result.duration_s,
        "num_requests": result.num_requests,
        "num_finished": result.num_finished,
        "goodput_requests_per_s": result.goodput,
        "throughput_tokens_per_s": result.tokens_per_s,
        "within_slo": result.within_slo,
        "ttft_ms": {f"p{q:g}": value * 1e3 for q, value in result.ttft_quantiles_s},
        "tpot_ms": {f"p{q:g}": value * 1e3 for q, value in result.tpot_quantiles_s},
        "num_reprefilled": result.num_reprefilled,
        "mean_batch": result.mean_batch,
    }


def calibration_json(fitted: Sequence[FittedWiring], comparisons: Sequence[Comparison]) -> Json:
    """Fits, and predictions held against measurements; those that could not be made are null."""
    return {
        "fits": [{**dataclasses.asdict(one), "method": one.method} for one in fitted],
        "comparisons": [
            {
                **dataclasses.asdict(c.measurement),
                "predicted_s": None if math.isnan(c.predicted_s) else c.predicted_s,
                "error": None if math.isnan(c.predicted_s) else c.error,
                "held_out": c.held_out,
            }
            for c in comparisons
        ],
    }


def models_json(models: Sequence[Model]) -> Json:
    """Models of the library."""
    return {
        model.name: {
            "title": model.title,
            "source": model.source,
            "parameters": model.shape.total_weights,
            "activated_parameters": model.shape.activated_weights,
            "ffn_parameters": model.shape.ffn_weights,
            "attention_side_parameters": model.shape.attention_side_weights,
            "num_layers": model.shape.num_layers,
        }
        for model in models
    }
