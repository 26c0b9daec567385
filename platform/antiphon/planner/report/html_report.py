"""One self-contained HTML page of a plan: verdict, tables, pictures, derivation (control speed).

No script, no external asset, readable on light and dark. Must not know: how anything was computed.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from antiphon.core.errors import InvalidInput
from antiphon.planner.cost.formula import Derivation
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.library import Model
from antiphon.planner.cost.token_cost import token_cost
from antiphon.planner.options import Option, Planner, Wiring
from antiphon.planner.pipeline.ubatches import PipelineRun, simulate_layers
from antiphon.planner.plan import Plan, finite
from antiphon.planner.report import plots
from antiphon.planner.report.tables import (
    Table,
    derivation_lines,
    formats_line,
    option_table,
    roles_table,
    simulation_table,
    traffic_line,
)
from antiphon.planner.search import best_option
from antiphon.planner.simulation.deployment import SimulationResult

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TARGET_FACTORS = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
GANTT_LAYERS = 4
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2127; background: #ffffff; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.verdict { border-left: 4px solid #2f7fd0; padding: .3rem .9rem; background: rgba(47,127,208,.10); }
.verdict.infeasible { border-color: #c0392b; background: rgba(192,57,43,.12); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid currentColor; } tbody tr { border-bottom: 1px solid rgba(128,128,128,.3); }
svg { width: 100%; height: auto; } figure { margin: 0; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { color: #e4e7eb; background: #14181d; } }
"""


def report(
    plan: Plan,
    model: Model,
    cards: Sequence[Accelerator],
    derivation: Derivation,
    simulation: SimulationResult | None = None,
) -> str:
    """The page."""
    verdict_class = "verdict infeasible" if plan.chosen is None else "verdict"
    parts = [
        f"<h1>{html.escape(model.title)}: {html.escape(plan.verdict)}</h1>",
        f'<p class="{verdict_class}">{html.escape(plan.reason)}</p>',
        f"<p>{html.escape(traffic_line(plan.planner.demand.traffic))}<br>{html.escape(formats_line(plan.planner.formats))}</p>",
    ]
    if plan.chosen is not None:
        parts += ["<h2>What to run</h2>", _table(roles_table(plan)), "<h2>Options</h2>", _table(option_table(plan))]
    if simulation is not None:
        parts += ["<h2>Simulated</h2>", _table(simulation_table(simulation))]
    priced = [card for card in cards if card.usd_per_hour is not None]
    if priced:
        parts += ["<h2>Cost against context</h2>", _figure(_cost_picture(plan, model, priced))]
    parts += ["<h2>TPOT against throughput</h2>", _figure(_pareto_picture(plan))]
    afd = plan.options.get(Wiring.AFD)
    if afd is not None:
        text = f"Pipeline of {afd.point.layout.name}, first {GANTT_LAYERS} layers"
        parts += [f"<h2>{text}</h2>", _figure(_gantt_picture(afd))]
    lines = html.escape("\n".join(derivation_lines(derivation)))
    parts += ["<h2>Every number</h2>", f"<details><summary>Formulas with values</summary><pre>{lines}</pre></details>"]
    body = "\n".join(parts)
    title = html.escape(f"Plan of {model.title}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cost_picture(plan: Plan, model: Model, priced: Sequence[Accelerator]) -> str:
    formats = plan.planner.formats
    costs = [token_cost(model, priced, context, formats) for context in CONTEXTS]
    lines = {"AFD, cheapest mix": [cost.afd_usd for cost in costs]}
    for card in priced[: len(plots.COLOURS) - 1]:
        lines[f"all on {card.key}"] = [cost.colocated_usd(card.key) for cost in costs]
    return plots.cost_against_context(CONTEXTS, lines, f"Cost of {model.title} against context, at full utilisation")


def _pareto_picture(plan: Plan) -> str:
    chosen = plan.chosen
    return plots.pareto(
        {wiring.value: frontier(plan.planner, wiring) for wiring in Wiring},
        finite(plan.planner.demand.tpot_s),
        None if chosen is None else (chosen.tpot_s, chosen.score),
        "output tokens/s per card" if plan.planner.unpriced else "million output tokens per USD",
    )


def frontier(planner: Planner, wiring: Wiring) -> list[tuple[float, float]]:
    """TPOT of the wiring's best option at several targets, with million tokens per USD (or tokens/s per card, unpriced)."""
    target = finite(planner.demand.tpot_s) or 0.05
    points = {}
    for factor in TARGET_FACTORS:
        option = best_option(planner.with_tpot(target * factor), wiring)
        if option is not None:
            points[round(option.tpot_s, 5)] = option.score
    return sorted(points.items())


def pipeline_run(option: Option) -> PipelineRun:
    """One exact step of an AFD option's group, one of its equal attention workers drawn."""
    layers = [kind.times for kind in option.point.kinds for _ in range(kind.count)]
    return simulate_layers(layers[-GANTT_LAYERS:], option.point.layout.num_ubatches, keep_segments=True)


def _gantt_picture(option: Option) -> str:
    if not math.isfinite(option.tpot_s):
        raise InvalidInput("a step without end can't be drawn", "tpot")
    return plots.gantt(pipeline_run(option), GANTT_LAYERS, option.point.layout.num_ubatches)
