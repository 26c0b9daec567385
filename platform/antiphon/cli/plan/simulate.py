"""``antiphon plan simulate`` (control speed)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from antiphon.cli.plan.options import AsJson, CardOptions, PlanOptions, spread
from antiphon.cli.plan.show import show
from antiphon.core.errors import InvalidInput

if TYPE_CHECKING:
    from antiphon.planner.simulation.deployment import SimulationInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How long, and what goes wrong meanwhile."""

    duration_s: Annotated[float, typer.Option("--duration-s", min=1, help="Simulated seconds.")] = 600
    warm_up_s: Annotated[float, typer.Option("--warm-up-s", min=0, help="Seconds not counted.")] = 60
    failures: Annotated[float, typer.Option("--failures", min=0, help="Failures per card and hour.")] = 0
    repair_s: Annotated[float, typer.Option("--repair-s", min=0, help="Seconds until a worker is back.")] = 120
    failover_s: Annotated[float, typer.Option("--failover-s", min=0, help="Seconds until an FFN shard is replaced.")] = 1
    stragglers: Annotated[float, typer.Option("--stragglers", min=0, help="Slowdowns per card and hour.")] = 0
    straggle_factor: Annotated[float, typer.Option("--straggle-factor", min=1, help="How slow.")] = 1.5
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and failures.")] = 0

    def inputs(self, rate: float | None) -> SimulationInput:
        """The simulation's input; rate None = the trace's own arrivals."""
        from antiphon.planner.simulation.deployment import SimulationInput

        return SimulationInput(
            rate=rate,
            duration_s=self.duration_s,
            warm_up_s=self.warm_up_s,
            failures_per_card_hour=self.failures,
            repair_s=self.repair_s,
            ffn_failover_s=self.failover_s,
            stragglers_per_card_hour=self.stragglers,
            straggle_factor=self.straggle_factor,
            seed=self.seed,
        )


@spread
def simulate(
    asked: PlanOptions,
    cards: CardOptions,
    run: RunOptions,
    wiring: Annotated[str | None, typer.Option("--wiring", help="colocated, pd or afd; none = the verdict's.")] = None,
    trace_arrivals: Annotated[bool, typer.Option("--trace-arrivals", help="Arrivals of the trace, not Poisson.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then run the planned pools under arrivals, failures and stragglers."""
    from antiphon.planner.options import Wiring
    from antiphon.planner.plan import make_plan
    from antiphon.planner.report.as_json import plan_json, simulation_json
    from antiphon.planner.report.tables import roles_table, simulation_table
    from antiphon.planner.simulation.deployment import default_rate, simulate_option

    planner = asked.question(cards).planner
    plan = make_plan(planner)
    if wiring is not None and wiring not in {w.value for w in Wiring}:
        raise InvalidInput(f"no wiring {wiring!r}; they are {', '.join(w.value for w in Wiring)}", "wiring")
    option = plan.chosen if wiring is None else plan.options.get(Wiring(wiring))
    if option is None:
        raise InvalidInput(f"nothing to simulate: {plan.reason}", "wiring")
    inputs = run.inputs(None if trace_arrivals else default_rate(planner, option))
    result = simulate_option(planner, option, inputs)
    if as_json:
        value = {
            "plan": plan_json(plan),
            "wiring": option.wiring.value,
            "rate": inputs.rate,
            "simulation": simulation_json(result),
        }
        print(json.dumps(value, indent=2))
        return
    show([roles_table(plan), simulation_table(result)] if option is plan.chosen else [simulation_table(result)])
