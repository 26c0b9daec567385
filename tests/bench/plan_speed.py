"""How long planning and simulating take: a plan for 1,000 accelerators, and an hour of 500 requests per second.

Run: python tests/bench/plan_speed.py [--simulated-s 3600]. Prints one JSON line per measurement; limits are the promises.
"""

import argparse
import json
import time

from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model
from antiphon.planner.fleet import assign
from antiphon.planner.options import Assumptions, Demand, Planner
from antiphon.planner.plan import make_plan
from antiphon.planner.simulation.deployment import SimulationInput, simulate_option
from antiphon.planner.traffic import RequestShape, Traffic

PLAN_LIMIT_S, HOUR_LIMIT_S = 2.0, 60.0
TRAFFIC = Traffic.of(
    [
        RequestShape(prompt_tokens=500, output_tokens=200),
        RequestShape(prompt_tokens=2000, output_tokens=300),
        RequestShape(prompt_tokens=4000, output_tokens=500),
    ]
)


def planner(name: str, **demand: float) -> Planner:
    """A question on H20 attention and H800 for the rest."""
    model, catalogue = find_model(name), Catalogue.built_in()
    fixed = {role: catalogue.get("H800") for role in ("colocated", "prefill", "decode", "ffn")}
    cards = assign(model, model.formats, TRAFFIC.mean_context, catalogue.priced, {**fixed, "attention": catalogue.get("H20")})
    return Planner(
        shape=model.shape,
        formats=model.formats,
        cards=cards,
        assumptions=Assumptions(),
        demand=Demand(traffic=TRAFFIC, tpot_s=0.05, ttft_s=2.0, **demand),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated-s", type=float, default=3600.0)
    simulated_s = parser.parse_args().simulated_s
    for name in ("deepseek-v3", "step-3", "qwen3-235b-a22b"):
        asked = planner(name, budget_cards=1000)
        start, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(asked)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        line = {
            "measured": "plan",
            "model": name,
            "cards": 1000,
            "verdict": plan.verdict,
            "s": round(seconds, 3),
            "cpu_s": round(cpu, 3),
        }
        print(json.dumps(line | {"limit_s": PLAN_LIMIT_S, "kept": seconds < PLAN_LIMIT_S}))
    asked = planner("qwen3-30b-a3b", rate=500.0)
    plan = make_plan(asked)
    for wiring, option in plan.options.items():
        start, cpu = time.perf_counter(), time.process_time()
        inputs = SimulationInput(rate=500.0, duration_s=simulated_s, warm_up_s=min(60.0, simulated_s / 10))
        result = simulate_option(asked, option, inputs)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        limit_s = HOUR_LIMIT_S * simulated_s / 3600
        line = {"measured": "simulation", "wiring": wiring.value, "cards": option.num_cards, "simulated_s": simulated_s}
        line |= {"requests": result.num_requests, "events": result.num_events, "within_slo": round(result.within_slo, 4)}
        print(json.dumps(line | {"s": round(seconds, 2), "cpu_s": round(cpu, 2), "limit_s": limit_s, "kept": seconds < limit_s}))


if __name__ == "__main__":
    main()
