"""The best option of a wiring is the best there is: no group that fits a budget does much better than the one found."""

import pytest

from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model
from antiphon.planner.layouts import Bounds, near
from antiphon.planner.options import Assumptions, Cards, Demand, Planner, Wiring
from antiphon.planner.pipeline.group import Layout
from antiphon.planner.plan import make_plan
from antiphon.planner.search import best_option
from antiphon.planner.traffic import Traffic
from antiphon.planner.verdict import binding

CATALOGUE = Catalogue.built_in()


def planner(name, key, *, context=8192, **demand):
    model, card = find_model(name), CATALOGUE.get(key)
    return Planner(
        shape=model.shape,
        formats=model.formats,
        cards=Cards(colocated=card, prefill=card, decode=card, attention=card, ffn=card),
        assumptions=Assumptions(),
        demand=Demand(traffic=Traffic.at_context(context), **demand),
    )


def groups(asked, wiring):
    """Every group of a budget."""
    most = asked.demand.budget_cards
    for tensor in asked.tensor_sizes(asked.decode_model(wiring)):
        for x in range(tensor, most + 1, tensor):
            if wiring is Wiring.AFD:
                for y in range(1, most - x + 1):
                    yield from (Layout(num_attention=x, num_ffn=y, num_ubatches=count, tensor=tensor) for count in (1, 2, 3, 4))
            else:
                for count in (1, 2):
                    yield Layout(num_attention=x, num_ffn=x, num_ubatches=count, colocated=True, tensor=tensor)


def tokens_per_s(asked, wiring, layout):
    """Of as many groups as the budget takes with prefill pools for their full batches; worked out without the search."""
    point = asked.decode_model(wiring).best_point(layout, asked.demand.tpot_s)
    if point is None:
        return 0.0
    best = 0.0
    for count in range(1, asked.demand.budget_cards // layout.num_cards + 1):
        rate = count * point.tokens_per_s / asked.demand.traffic.mean_output
        pool = asked.prefill_model().smallest_pool(
            rate,
            ttft_s=asked.demand.ttft_s,
            max_cards=asked.demand.budget_cards - count * layout.num_cards,
            first_step_s=point.step_s,
            decode_net=CATALOGUE.get("H800").nic_bandwidth,
        )
        best = best if pool is None else max(best, count * point.tokens_per_s)
    return best


@pytest.mark.parametrize(
    ("name", "budget", "wiring", "tpot_s"),
    [
        ("deepseek-v3", 64, Wiring.PD, 0.05),  # the group that decodes cheapest left 18 of 64 cards idle
        ("step-3", 40, Wiring.PD, 0.05),
        ("qwen3-30b-a3b", 12, Wiring.AFD, 0.03),
        ("gpt-oss-120b", 10, Wiring.AFD, 0.02),
    ],
)
def test_no_group_of_the_budget_serves_much_more_than_the_one_found(name, budget, wiring, tpot_s):
    asked = planner(name, "H800", budget_cards=budget, tpot_s=tpot_s, ttft_s=2.0)
    found = best_option(asked, wiring)
    most = max(tokens_per_s(asked, wiring, layout) for layout in groups(asked, wiring))
    assert found.tokens_per_s >= 0.97 * most > 0
    assert found.num_cards <= budget


def test_a_budget_that_full_batches_would_overflow_runs_smaller_ones():
    """Eight cards hold two copies of the model, but not the prompts that a full batch of the second would bring."""
    asked = planner("llama-3.3-70b", "H100", budget_cards=8, tpot_s=0.03)
    plan = make_plan(asked)
    option = plan.options[Wiring.PD]
    full = asked.decode_model(Wiring.PD).best_point(option.point.layout, 0.03)
    assert option.num_cards == 8
    assert option.point.batch < full.batch
    assert option.tokens_per_s == pytest.approx(option.point.tokens_per_s)
    assert "prefill cards" in binding(asked, option)


def test_steps_from_a_layout_stay_within_the_bounds():
    bounds = Bounds(most_cards=20, least=3, tensors=(1, 2, 4), max_ubatches=4)
    for at in (
        Layout(num_attention=8, num_ffn=3, num_ubatches=4, tensor=4),
        Layout(num_attention=4, num_ffn=4, num_ubatches=1, colocated=True, tensor=4),
    ):
        found = near(at, bounds)
        assert found
        assert at not in found
        for layout in found:
            assert layout.num_cards <= 20
            assert layout.num_ffn >= 3
            assert layout.num_attention % layout.tensor == 0
            assert layout.num_attention == layout.num_ffn or not layout.colocated
