"""Plans: verdicts, constraints that fail, and properties that hold for any input."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import InvalidInput
from antiphon.planner.constraints import Constraint, step_floor, violations
from antiphon.planner.cost.hardware import Catalogue, Efficiency
from antiphon.planner.cost.library import find_model
from antiphon.planner.cost.token_cost import token_cost
from antiphon.planner.fleet import assign
from antiphon.planner.options import Assumptions, Demand, Planner, Wiring
from antiphon.planner.pipeline.group import Contexts, DecodeModel, Layout, largest, last_within
from antiphon.planner.pipeline.stages import Roofline
from antiphon.planner.pipeline.ubatches import simulate_layers
from antiphon.planner.plan import explain, make_plan
from antiphon.planner.report.html_report import report
from antiphon.planner.search import best_option
from antiphon.planner.traffic import RequestShape, Traffic

CATALOGUE = Catalogue.built_in()
CHAT = Traffic.of([RequestShape(prompt_tokens=1500, output_tokens=500), RequestShape(prompt_tokens=6000, output_tokens=900)])


def planner(name="qwen3-30b-a3b", *, traffic=CHAT, roles=None, **demand):
    model = find_model(name)
    fixed = {role: CATALOGUE.get(key) for role, key in (roles or {}).items()}
    cards = assign(model, model.formats, traffic.mean_context, [CATALOGUE.get("H800"), CATALOGUE.get("H20")], fixed)
    wanted = {"tpot_s": 0.05, "ttft_s": 2.0, "budget_cards": 64} | demand
    return Planner(
        shape=model.shape,
        formats=model.formats,
        cards=cards,
        assumptions=Assumptions(),
        demand=Demand(traffic=traffic, **wanted),
    )


def all_on(planner_, card):
    return dataclasses.replace(
        planner_,
        cards=dataclasses.replace(planner_.cards, **dict.fromkeys(("colocated", "prefill", "decode", "attention", "ffn"), card)),
    )


def one_group(card, *, name="qwen3-235b-a22b", efficiency=None, contexts=None):
    model = find_model(name)
    stages = Roofline(shape=model.shape, formats=model.formats, attention=card, ffn=card, efficiency=efficiency or Efficiency())
    return DecodeModel(stages=stages, contexts=contexts or Contexts(mean=6000, deviation=800))


def test_the_chosen_option_keeps_every_target_and_the_budget():
    plan = make_plan(planner())
    assert plan.chosen is not None
    assert plan.chosen.tpot_s <= 0.05
    assert plan.chosen.ttft_s <= 2.0
    assert plan.chosen.num_cards == sum(count for count, _ in plan.roles.values()) <= 64


def test_attention_on_cheap_bandwidth_and_ffn_on_cheap_compute_make_afd_pay():
    long = Traffic.of([RequestShape(prompt_tokens=1000, output_tokens=4000)])
    # Not on H20: eight queries that share a KV head fill an eighth of its matrix unit (published: twice H800's time).
    plan = make_plan(planner(traffic=long, roles={"attention": "A800", "ffn": "H800", "decode": "H800", "colocated": "H800"}))
    assert plan.verdict == "afd"
    assert "attention runs on A800, the FFN on H800" in plan.reason
    assert plan.chosen.usd_per_mtok < plan.options[Wiring.PD].usd_per_mtok
    assert plan.chosen.usd_per_mtok < plan.options[Wiring.COLOCATED].usd_per_mtok


def test_attention_on_a_card_that_makes_it_dearer_is_why_afd_loses():
    """Latent attention computes 512 operations for a byte of cache, and H20 does 74."""
    on_h20 = {"attention": "H20", "ffn": "H800", "decode": "H800", "colocated": "H800", "prefill": "H800"}
    plan = make_plan(planner("deepseek-v3", roles=on_h20, budget_cards=None, rate=40.0))
    assert plan.verdict == "pd"
    assert re.search(r"a row of attention costs [\d.]+ times as much on H20 as on H800", plan.reason)


def test_a_small_dense_model_on_one_kind_of_card_is_told_not_to_use_afd():
    plan = make_plan(all_on(planner("qwen3-32b"), CATALOGUE.get("H800")))
    assert plan.verdict in ("colocated", "pd")
    assert "afd" in plan.reason.lower()


def test_a_fabric_too_slow_for_the_exchange_rules_afd_out_and_says_so():
    slow = dataclasses.replace(CATALOGUE.get("H800"), key="slow", nic_bandwidth=5e6, cards_per_node=1)
    asked = all_on(planner(tpot_s=0.03, ttft_s=math.inf), slow)
    found = {violation.constraint: violation for violation in violations(asked, Wiring.AFD)}
    assert found[Constraint.NETWORK].needed > found[Constraint.NETWORK].available
    assert make_plan(asked).verdict in ("colocated", "pd")


def test_links_too_slow_for_the_kv_rule_out_a_prefill_pool_and_say_so():
    slow = dataclasses.replace(CATALOGUE.get("H800"), key="slow", nic_bandwidth=2e7)
    plan = make_plan(all_on(planner(), slow))
    (violation,) = plan.failed[Wiring.PD]
    assert violation.constraint is Constraint.NETWORK
    assert violation.available == 2.0
    assert plan.verdict == "colocated"


def test_a_tpot_below_the_floor_says_the_floor():
    asked = planner(tpot_s=1e-4)
    plan = make_plan(asked)
    assert plan.verdict == "infeasible"
    for wiring in Wiring:
        (violation,) = [v for v in plan.failed[wiring] if v.constraint is Constraint.TPOT]
        assert violation.needed == step_floor(asked, wiring) > 1e-4
        assert violation.by == pytest.approx(violation.needed - 1e-4)
        assert "off by" in violation.text


@pytest.mark.parametrize(
    ("budget", "demand", "verdict"),
    [
        (64, {"tpot_s": 0.008}, "not modelled"),  # 64 cards read the weights in 4 ms, the eight of a node in 27
        (64, {"tpot_s": 0.002}, "infeasible"),  # kernels alone take longer
        (8, {"tpot_s": 0.008}, "infeasible"),  # there are no cards to spread attention over
        (64, {"context": 1_000_000}, "not modelled"),  # eight cards hold no such cache, 64 do
        (64, {"context": 20_000_000}, "infeasible"),
    ],
)
def test_what_only_attention_over_several_nodes_could_do_is_not_called_infeasible(budget, demand, verdict):
    traffic = Traffic.at_context(demand.pop("context", 8192))
    targets = {"tpot_s": math.inf, "ttft_s": math.inf} | demand
    plan = make_plan(all_on(planner("llama-3.3-70b", traffic=traffic, budget_cards=budget, **targets), CATALOGUE.get("L20")))
    assert plan.verdict == verdict
    assert ("is not modelled" in plan.reason) == (verdict == "not modelled")


def test_just_above_the_floor_is_feasible():
    asked = planner(ttft_s=math.inf)
    floor = step_floor(asked, Wiring.AFD)
    assert best_option(dataclasses.replace(asked, demand=dataclasses.replace(asked.demand, tpot_s=floor * 1.3)), Wiring.AFD)


def test_a_model_larger_than_the_budgets_memory_says_how_much_is_missing():
    plan = make_plan(planner("deepseek-v3", budget_cards=4))
    (violation,) = plan.failed[Wiring.COLOCATED]
    assert violation.constraint is Constraint.MEMORY
    assert violation.needed == pytest.approx(671e9, rel=0.01)
    assert violation.available == pytest.approx(4 * 0.9 * plan.planner.cards.colocated.memory_bytes)
    assert violation.text in plan.reason


def test_a_time_to_first_token_below_the_physical_floor_is_named():
    plan = make_plan(planner(ttft_s=1e-3))
    assert {v.constraint for found in plan.failed.values() for v in found} == {Constraint.TTFT}


def test_a_rate_beyond_the_budget_says_what_the_budget_reaches():
    plan = make_plan(planner(budget_cards=16, rate=5000.0))
    assert plan.verdict == "infeasible"
    (violation,) = plan.failed[Wiring.COLOCATED]
    assert violation.constraint is Constraint.RATE
    reached = make_plan(planner(budget_cards=16, rate=violation.available * 0.9))
    assert Wiring.COLOCATED in reached.options


def test_a_budget_too_small_for_two_pools_says_how_many_cards_would_do():
    asked = planner("deepseek-v3", budget_cards=16)
    (violation,) = violations(asked, Wiring.PD)
    assert violation.constraint is Constraint.BUDGET
    assert violation.needed > 16
    assert violation.unit == "cards"


def test_a_plan_needs_a_budget_or_a_rate():
    with pytest.raises(InvalidInput, match="budget"):
        make_plan(planner(budget_cards=None))


def test_a_rate_without_a_budget_is_served_with_as_many_cards_as_it_takes():
    plan = make_plan(planner(budget_cards=None, rate=40.0))
    assert plan.chosen.tokens_per_s == pytest.approx(40 * CHAT.mean_output)
    assert make_plan(planner(budget_cards=None, rate=400.0)).chosen.num_cards > plan.chosen.num_cards


@given(st.integers(1, 300), st.sampled_from(["qwen3-30b-a3b", "qwen3-32b", "mixtral-8x7b"]), st.floats(0.01, 0.3))
@settings(max_examples=6, deadline=None)
def test_the_budget_and_the_memory_are_never_exceeded(budget, name, tpot_s):
    asked = planner(name, budget_cards=budget, tpot_s=tpot_s)
    for wiring in Wiring:
        option = best_option(asked, wiring)
        if option is None:
            continue
        model = asked.decode_model(wiring)
        assert option.num_cards <= budget
        assert option.tpot_s <= tpot_s
        assert option.point.attention_bytes <= model.usable_attention_bytes()
        assert option.point.ffn_bytes <= model.usable_ffn_bytes()


@given(st.floats(1, 8), st.sampled_from(["bandwidth", "nic_bandwidth", "scale_up_bandwidth"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_more_bandwidth_never_makes_a_group_slower(factor, link, colocated):
    card = CATALOGUE.get("H20")
    faster = dataclasses.replace(card, **{link: getattr(card, link) * factor})
    layout = Layout(num_attention=16, num_ffn=16, num_ubatches=2, colocated=colocated)
    for tpot_s in (0.03, 0.06):
        before, after = (one_group(c).best_point(layout, tpot_s) for c in (card, faster))
        if before is not None:
            assert after is not None
            assert after.tokens_per_s >= before.tokens_per_s * (1 - 1e-9)


@given(st.floats(1, 16), st.sampled_from(["step-3", "deepseek-v3", "qwen3-32b", "minimax-m1"]), st.integers(256, 200_000))
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_never_costs_more_per_token(factor, name, context):
    card = CATALOGUE.get("A800")
    faster = dataclasses.replace(card, key="faster", bandwidth=card.bandwidth * factor)
    cost = token_cost(find_model(name), [card, faster], context)
    assert cost.attention["faster"] <= cost.attention["A800"] * (1 + 1e-12)
    assert cost.afd_usd <= cost.colocated_usd(cost.best_colocated) * (1 + 1e-12)


def test_a_groups_step_is_the_simulated_pipelines():
    model = one_group(CATALOGUE.get("H800"), contexts=Contexts(mean=6000))
    for num_ubatches in (1, 2, 3, 4):
        layout = Layout(num_attention=12, num_ffn=8, num_ubatches=num_ubatches)
        seconds, kinds, head = model.step(layout, 40)
        run = simulate_layers([kind.times for kind in kinds for _ in range(kind.count)], num_ubatches)
        assert seconds - head == pytest.approx(run.step_s, rel=1e-9)


def test_layers_of_two_kinds_are_within_two_percent_of_the_simulated_pipeline():
    model = one_group(CATALOGUE.get("H800"), name="deepseek-v3", contexts=Contexts(mean=6000))
    layout = Layout(num_attention=32, num_ffn=16, num_ubatches=3)
    seconds, kinds, head = model.step(layout, 40)
    run = simulate_layers([kind.times for kind in kinds for _ in range(kind.count)], 3)
    assert seconds - head == pytest.approx(run.step_s, rel=0.02)


@given(st.integers(1, 2000), st.floats(0.1, 5), st.integers(1, 1500))
def test_the_search_for_a_batch_is_exact(limit, slope, threshold):
    assert largest(lambda n: n <= threshold, limit) == min(limit, threshold)
    seconds = {n: n**slope for n in range(1, limit + 1)}
    target = seconds[min(limit, threshold)]
    assert last_within(seconds.__getitem__, target, limit) == max(n for n, s in seconds.items() if s <= target)


def test_a_plan_for_a_thousand_cards_looks_at_few_of_its_layouts(monkeypatch):
    """Seconds are measured in tests/bench/plan_speed.py; what they follow is the number of steps that are worked out."""
    steps, step = [], DecodeModel.step
    monkeypatch.setattr(DecodeModel, "step", lambda *args, **others: steps.append(1) or step(*args, **others))
    asked = planner("deepseek-v3", budget_cards=1000, roles={"attention": "H20", "ffn": "H800"})
    assert make_plan(asked).chosen is not None
    assert 0 < len(steps) < 50_000  # of half a million pairs of pool sizes, each at many batches


def test_the_explanation_covers_the_chosen_option():
    plan = make_plan(planner())
    names = {step.name for step in explain(plan).steps}
    assert {"kv_bytes_read", "core_s", "ffn_cards_s", "group_rate", "attention_memory"} <= names


def test_the_report_is_one_file_without_scripts_or_external_assets():
    plan = make_plan(planner(budget_cards=16))
    page = report(plan, find_model("qwen3-30b-a3b"), [CATALOGUE.get("H800")], explain(plan))
    assert page.count("<svg") >= 2
    assert plan.reason.split(";")[0].replace("'", "&#x27;") in page
    for outside in ("<script", "<link", "<img", "@import", 'src="', 'href="http'):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    assert "#010203" not in page


def test_an_infeasible_plan_still_has_a_report():
    plan = make_plan(planner("deepseek-v3", budget_cards=2))
    page = report(plan, find_model("deepseek-v3"), [CATALOGUE.get("H800")], explain(plan))
    assert "infeasible" in page


def test_longer_contexts_shift_the_balance_to_attention():
    layout = Layout(num_attention=16, num_ffn=8, num_ubatches=3)
    shares = []
    for context in (2048, 8192, 32768):
        model = one_group(CATALOGUE.get("H20"), contexts=Contexts(mean=context))
        times = model.layer_times(layout, 32)[-1].times
        shares.append(times.attention_s / times.ffn_s)
    assert shares == sorted(shares)
    assert shares[-1] > 2 * shares[0]
