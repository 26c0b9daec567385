"""Plans, costs and simulations as tables of text: what a terminal and the report show (control speed).

Must not know: terminals or HTML.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antiphon.planner.calibration.fit import Comparison
from antiphon.planner.cost.formats import Formats
from antiphon.planner.cost.formula import Derivation
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.library import Model
from antiphon.planner.cost.model_cost import model_cost
from antiphon.planner.cost.token_cost import TokenCost
from antiphon.planner.options import Option
from antiphon.planner.plan import Plan
from antiphon.planner.simulation.deployment import SimulationResult
from antiphon.planner.traffic import Traffic

SCATTER = 0.2  # errors of a fit above this are of the measurements, not of the fit's form


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def si(value: float, unit: str = "") -> str:
    """Three digits with an SI prefix."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = min(max(math.floor(math.log10(abs(value)) / 3), -3), 6)
    prefix = {-3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}".strip()


def digits(value: float) -> str:
    """Four significant digits, all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def cost_tables(cost: TokenCost) -> list[Table]:
    """What one token costs, and its price by accelerator."""
    model, row = cost.model, cost.model.decode
    facts = (
        ("KV or state moved", si(row.kv_bytes, "B")),
        ("attention", si(row.attention_flops, "FLOP")),
        ("projections", si(row.linear_flops, "FLOP")),
        ("FFN", si(row.ffn_flops, "FLOP")),
        ("router", si(row.router_flops, "FLOP")),
        ("LM head", si(model.head_flops, "FLOP")),
        ("arithmetic intensity of attention", f"{model.arithmetic_intensity:.0f} FLOP/B"),
        ("KV kept per context token", si(model.kv_bytes_per_cached_token, "B")),
        ("cache of one request", si(model.cache_bytes, "B")),
        ("prefill, per prompt token", si(model.prefill.flops, "FLOP")),
    )
    prices = tuple(
        (key, f"{cost.attention[key]:.3f}", f"{cost.ffn[key]:.3f}", f"{cost.colocated_usd(key):.3f}") for key in cost.attention
    )
    mix = f"AFD: {cost.best_attention} + {cost.best_ffn}"
    best = (mix, f"{cost.attention[cost.best_attention]:.3f}", f"{cost.ffn[cost.best_ffn]:.3f}", f"{cost.afd_usd:.3f}")
    return [
        Table(title=f"{model.model}, one decoded token at context {model.context:.0f}", columns=("part", "cost"), rows=facts),
        Table(
            title="USD per million decoded tokens, at full utilisation",
            columns=("hardware", "attention", "FFN", "both"),
            rows=(*prices, best),
        ),
    ]


def roles_table(plan: Plan) -> Table:
    """Cards of the chosen option."""
    rows = [(role, str(count), card.key) for role, (count, card) in plan.roles.items()]
    if plan.chosen is not None and plan.chosen.num_idle:
        rows.append(("idle, paid for", str(plan.chosen.num_idle), plan.chosen.idle_card.key))
    return Table(title="cards", columns=("role", "cards", "hardware"), rows=tuple(rows))


def traffic_line(traffic: Traffic) -> str:
    """What the plan is for, in a sentence."""
    kinds = len(traffic.requests)
    each = "" if kinds == 1 else f" on average over {kinds} kinds of requests"
    return (
        f"traffic: prompts of {traffic.mean_prompt:,.0f} and outputs of {traffic.mean_output:,.0f} tokens{each}; "
        f"a decode row sees a context of {traffic.mean_context:,.0f} tokens (its prompt and the output so far)"
    )


def formats_line(formats: Formats) -> str:
    """What a model is planned to be served in, in a sentence."""
    local = "" if formats.local_kv == formats.kv else f" ({formats.local_kv} in layers with a window)"
    return (
        f"formats: weights {formats.weights}, products with them {formats.compute}, attention {formats.attention}, "
        f"KV cache {formats.kv}{local}"
    )


def option_table(plan: Plan) -> Table:
    """Every wiring side by side."""
    options = list(plan.options.items())

    def line(name: str, cells: Sequence[str]) -> tuple[str, ...]:
        return (name, *cells)

    def each(name: str, show: str) -> tuple[str, ...]:
        return line(name, [_cell(option, show, plan) for _, option in options])

    rows = [
        each("group", "group"),
        each("groups", "groups"),
        each("cards, prefill included", "cards"),
        each("idle cards of the budget, paid for", "idle"),
        each("ubatches x rows per attention rank", "ubatches"),
        each("rows that meet at the FFN", "ffn_rows"),
        each("T_a / T_f per layer and ubatch", "stages"),
        each("A2F / F2A", "links"),
        each("exchange through a node's NICs", "exchange"),
        each("memory per attention / FFN card", "memory"),
        each("TPOT", "tpot"),
        each("TTFT, 95 %", "ttft"),
        each("output tokens/s", "tokens"),
        each("output tokens/s per card, idle ones too", "per_card"),
        each("USD per million output tokens", "usd"),
        each("prefill : decode cards", "ratio"),
        each("bound by", "binding"),
    ]
    names = [("* " if option is plan.chosen else "") + wiring.value for wiring, option in options]
    return Table(title=f"options (* {plan.verdict})", columns=("", *names), rows=tuple(rows))


def _cell(option: Option, show: str, plan: Plan) -> str:
    point, times = option.point, option.point.main.times
    usd = option.usd_per_mtok
    cells = {
        "group": point.layout.name,
        "groups": str(option.num_groups),
        "cards": str(option.num_cards),
        "idle": f"{option.num_idle} {option.idle_card.key}" if option.num_idle else "0",
        "ubatches": f"{point.layout.num_ubatches} x {point.computed_rows}",
        "ffn_rows": str(point.rows_per_ffn_ubatch),
        "stages": f"{1e6 * times.attention_s:.0f} / {1e6 * times.ffn_s:.0f} us",
        "links": f"{1e6 * times.a2f_s:.0f} / {1e6 * times.f2a_s:.0f} us",
        "exchange": si(point.main.exchange.node_bytes, "B"),
        "memory": f"{si(point.attention_bytes, 'B')} / {si(point.ffn_bytes, 'B')}",
        "tpot": f"{1e3 * option.tpot_s:.1f} ms",
        "ttft": f"{1e3 * option.ttft_s:.0f} ms",
        "tokens": digits(option.tokens_per_s),
        "per_card": digits(option.tokens_per_s_per_card),
        "usd": "no price" if usd is None else digits(usd),
        "ratio": "-" if option.prefill is None else f"{option.prefill_decode_ratio:.2f}",
        "binding": plan.bindings[option.wiring],
    }
    return cells[show]


def verdict_lines(plan: Plan) -> list[str]:
    """The verdict, its reason, and whether the fabric feeds the FFN."""
    lines = [f"{plan.verdict}: {plan.reason}"]
    if plan.fabric is not None:
        feeds = "feeds" if plan.fabric.feeds else "is too slow to fill"
        lines.append(
            f"fabric: sparsity {plan.fabric.sparsity:.3f} of the model, {plan.fabric.min_sparsity:.3f} the least that "
            f"fills its FFN cards in three stages; it {feeds} them"
        )
    return lines


def simulation_table(result: SimulationResult) -> Table:
    """What a simulation saw."""
    rows = [
        ("simulated", f"{result.duration_s:.0f} s"),
        ("requests arrived / finished", f"{result.num_requests} / {result.num_finished}"),
        ("goodput", f"{result.goodput:.1f} requests/s"),
        ("within both targets", f"{result.within_slo:.1%}"),
        ("output tokens/s", f"{result.tokens_per_s:,.0f}"),
        ("batch of a decode worker", f"{result.mean_batch:.1f}"),
        ("requests prefilled again", str(result.num_reprefilled)),
    ]
    rows += [(f"TTFT, {q:g} %", f"{1e3 * value:.0f} ms") for q, value in result.ttft_quantiles_s]
    rows += [(f"TPOT, {q:g} %", f"{1e3 * value:.1f} ms") for q, value in result.tpot_quantiles_s]
    return Table(title="simulation", columns=("", "seen"), rows=tuple(rows))


def hardware_table(cards: Sequence[Accelerator]) -> Table:
    """Known accelerators; what each is called and where its figures are from stands in ``source_lines``."""
    rows = tuple(
        (
            card.key,
            *(f"{card.flops[name] / 1e12:,.0f}" if name in card.flops else "-" for name in ("bf16", "fp8", "int8")),
            f"{card.memory_bytes / 1e9:,.0f}",
            f"{card.bandwidth / 1e12:.2f}",
            f"{card.scale_up_bandwidth / 1e9:,.0f}",
            f"{card.nic_bandwidth / 1e9:,.0f}",
            str(card.cards_per_node),
            "-" if card.usd_per_hour is None else f"{card.usd_per_hour:g}",
        )
        for card in cards
    )
    columns = ("key", "bf16", "fp8", "int8", "GB", "TB/s", "in node", "NIC", "cards a node", "USD/h")
    return Table(title="accelerators, by card: Tflop/s (int8: Top/s), memory, links one way in GB/s", columns=columns, rows=rows)


def source_lines(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line each of key, title and source."""
    return [f"{key}: {title}. {source}" for key, title, source in entries]


def models_table(models: Sequence[Model]) -> Table:
    """Models of the library."""
    rows = tuple(
        (
            model.name,
            si(model.shape.total_weights),
            si(model.shape.activated_weights),
            str(model.shape.num_layers),
            f"{1.0 if model.shape.experts is None else model.shape.experts.sparsity:.3f}",
            si(model_cost(model.shape, model.formats, 8192).cache_bytes, "B"),
        )
        for model in models
    )
    columns = ("name", "weights", "active", "layers", "sparsity", "8K cache")
    return Table(title="models", columns=columns, rows=rows)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Predictions against measurements; what all of them have in common stands in the title."""
    models = {c.measurement.model for c in comparisons}
    common = f"; {next(iter(models))}" if len(models) == 1 else ""
    rows = tuple(
        (
            *(() if common else (c.measurement.model,)),
            c.measurement.wiring,
            str(c.measurement.batch),
            f"{c.measurement.context:.0f}",
            f"{1e3 * c.measurement.decode_step_s:.2f}",
            f"{1e3 * c.predicted_s:.2f}",
            f"{c.error:+.1%}",
            "held out" if c.held_out else "fitted",
        )
        for c in comparisons
    )
    columns = (*(() if common else ("model",)), "wiring", "batch", "context", "measured", "predicted", "error", "")
    return Table(title=f"decode step in ms, predicted against measured{common}", columns=columns, rows=rows)


def scatter_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """A warning when no fit goes through what was measured."""
    worst = max((abs(c.error) for c in comparisons if not math.isnan(c.predicted_s)), default=0.0)
    if worst <= SCATTER:
        return []
    return [f"The fit is off by up to {worst:.0%}: the measurements scatter. Measure again on a machine that does nothing else."]


def share_lines(shares: Mapping[str, float], errors: Sequence[float]) -> list[str]:
    """What was fitted, how well it says the stages that were measured, and what stays as it was."""
    lines = [f"efficiency {name} = {value:.4g}" for name, value in shares.items()]
    if errors:
        off = [abs(error) for error in errors]
        lines.append(f"stage times with these: off by {sum(off) / len(off):.0%} on average, {max(off):.0%} at most")
    full = [name for name, value in shares.items() if value >= 1 and not name.endswith("_s")]
    if full:
        lines.append(f"{', '.join(full)}: stages were as fast as the accelerator's peak, or faster; its figures may be too low")
    kept = [field.name for field in dataclasses.fields(Efficiency) if field.name not in shares]
    if kept:
        lines.append(f"{', '.join(kept)}: not to be told from these measurements; deploy keeps what it has")
    return lines


def derivation_lines(derivation: Derivation) -> list[str]:
    """Each step: meaning, formula, values, result."""
    lines, section = [], ""
    for step in derivation.steps:
        if step.section != section:
            section = step.section
            lines += ["", f"== {section}"]
        values = ", ".join(f"{name} = {value:.6g}{f' {unit}' if unit else ''}" for name, value, unit in step.values)
        lines += [
            f"{step.name} = {step.result:.6g}{f' {step.unit}' if step.unit else ''}   {step.prose}",
            f"    = {step.text}",
            f"    {values}",
        ]
    return lines
