"""A simulated deployment does what its plan says, and worse when things break."""

import dataclasses

import pytest

from antiphon.core.errors import InvalidInput
from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model
from antiphon.planner.fleet import assign
from antiphon.planner.options import Assumptions, Demand, Planner, Wiring
from antiphon.planner.search import best_option
from antiphon.planner.simulation.deployment import SimulationInput, default_rate, simulate_option, step_table
from antiphon.planner.simulation.event_loop import Fault
from antiphon.planner.traffic import RequestShape, Traffic

CHAT = Traffic.of([RequestShape(prompt_tokens=500, output_tokens=200), RequestShape(prompt_tokens=2000, output_tokens=400)])


def planner(traffic=CHAT, **demand):
    model, catalogue = find_model("qwen3-30b-a3b"), Catalogue.built_in()
    fleet = [catalogue.get("H800"), catalogue.get("H20")]
    return Planner(
        shape=model.shape,
        formats=model.formats,
        cards=assign(model, model.formats, traffic.mean_context, fleet, {}),
        assumptions=Assumptions(),
        demand=Demand(traffic=traffic, **({"tpot_s": 0.03, "ttft_s": 1.0, "rate": 60.0} | demand)),
    )


@pytest.mark.parametrize("wiring", list(Wiring))
def test_a_planned_deployment_keeps_its_targets_under_the_planned_rate(wiring):
    asked = planner()
    option = best_option(asked, wiring)
    result = simulate_option(asked, option, SimulationInput(rate=60.0, duration_s=90, warm_up_s=30))
    assert result.within_slo > 0.95
    assert result.tokens_per_s == pytest.approx(60 * CHAT.mean_output, rel=0.1)
    assert result.ttft_s(95.0) <= option.ttft_s * 1.1
    assert result.tpot_s(95.0) <= option.tpot_s * 1.02


def test_twice_the_rate_breaks_the_targets():
    asked = planner()
    option = best_option(asked, Wiring.PD)
    result = simulate_option(asked, option, SimulationInput(rate=150.0, duration_s=90, warm_up_s=30))
    assert result.within_slo < 0.9


def test_full_groups_decode_at_the_planned_rate_within_two_percent():
    """Equal requests, all there at once: no variance, so the closed form is exact."""
    equal = Traffic.of([RequestShape(prompt_tokens=1000, output_tokens=400)])
    asked = planner(equal, rate=None, budget_cards=16)
    option = best_option(asked, Wiring.AFD)
    model = asked.decode_model(Wiring.AFD)
    step = step_table(dataclasses.replace(model), option.point.layout, option.point.batch)
    exact = dataclasses.replace(model, contexts=dataclasses.replace(model.contexts, deviation=0.0))
    batch = option.point.batch
    mean = sum(step(batch, batch * (1000 + k)) for k in range(400)) / 400
    assert mean == pytest.approx(exact.step(option.point.layout, option.point.rows)[0], rel=0.02)


def test_the_step_table_is_exact_on_its_grid_and_close_between():
    asked = planner()
    model, option = asked.decode_model(Wiring.PD), best_option(asked, Wiring.PD)
    layout, batch = option.point.layout, option.point.batch
    step = step_table(model, layout, batch)
    for rows in (batch, batch * 0.63, batch * 0.31):
        for context in (300, 1100, 1900):
            exact = dataclasses.replace(model, contexts=dataclasses.replace(model.contexts, mean=context, deviation=0.0))
            assert step(rows, rows * context) == pytest.approx(exact.step(layout, rows / layout.num_ubatches)[0], rel=0.02)


def test_failures_cost_goodput_and_lose_no_request():
    asked = planner()
    option = best_option(asked, Wiring.AFD)
    calm = simulate_option(asked, option, SimulationInput(rate=50.0, duration_s=90, warm_up_s=10))
    faults = tuple(Fault(at_s=20.0 + 5 * i, pool="attention", duration_s=20.0, worker=i) for i in range(3))
    hurt = simulate_option(asked, option, SimulationInput(rate=50.0, duration_s=90, warm_up_s=10, faults=faults))
    assert hurt.num_reprefilled > 0
    assert hurt.ttft_s(99.0) > calm.ttft_s(99.0)
    random = SimulationInput(rate=50.0, duration_s=90, warm_up_s=10, failures_per_card_hour=20, stragglers_per_card_hour=20)
    assert simulate_option(asked, option, random).goodput <= calm.goodput * 1.02


def test_a_trace_brings_its_own_arrivals():
    shapes = [RequestShape(prompt_tokens=500, output_tokens=50, arrival_s=0.1 * i) for i in range(100)]
    asked = planner(Traffic.of(shapes))
    result = simulate_option(asked, best_option(asked, Wiring.PD), SimulationInput(rate=None, duration_s=60, warm_up_s=5))
    assert result.num_requests == pytest.approx(10 * 55, rel=0.05)


def test_arrivals_must_come_from_somewhere():
    asked = planner()
    with pytest.raises(InvalidInput, match="rate"):
        simulate_option(asked, best_option(asked, Wiring.PD), SimulationInput(rate=None))
    with pytest.raises(InvalidInput, match="warm-up"):
        simulate_option(asked, best_option(asked, Wiring.PD), SimulationInput(rate=1.0, duration_s=10, warm_up_s=10))


def test_equal_seeds_give_equal_results():
    asked = planner()
    option, inputs = best_option(asked, Wiring.PD), SimulationInput(rate=40.0, duration_s=40, warm_up_s=5, failures_per_card_hour=5)
    assert simulate_option(asked, option, inputs) == simulate_option(asked, option, inputs)


def test_without_a_rate_the_planned_share_of_full_batches_is_simulated():
    asked = planner(rate=None, budget_cards=16)
    option = best_option(asked, Wiring.PD)
    assert default_rate(asked, option) == pytest.approx(0.9 * option.tokens_per_s / CHAT.mean_output)
