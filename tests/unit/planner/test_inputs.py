"""Accelerators, traffic, fabric and the local machine: what is read is what counts, what is wrong is named."""

import json

import numpy as np
import pytest

from antiphon.core.errors import InvalidInput
from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model
from antiphon.planner.cost.local_machine import measure_local
from antiphon.planner.fleet import assign
from antiphon.planner.pipeline.fabric import exchange, min_sparsity
from antiphon.planner.traffic import RequestShape, Traffic

CATALOGUE = Catalogue.built_in()


def test_every_accelerator_names_its_source():
    for card in CATALOGUE.accelerators.values():
        assert len(card.source) > 20


def test_only_the_four_with_published_prices_have_one():
    assert {card.key for card in CATALOGUE.priced} == {"H800", "H20", "A800", "910B"}


def test_a_card_without_a_format_computes_in_the_next_wider_one():
    assert CATALOGUE.get("A800").compute_format("fp8") == "bf16"
    assert CATALOGUE.get("H800").compute_format("fp8") == "fp8"
    with pytest.raises(InvalidInput, match="fp32"):
        CATALOGUE.get("A800").flops_in("fp32")


def test_a_file_adds_accelerators_and_changes_single_figures(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "H100: {usd_per_hour: 2.5}\n"
        "toy: {flops: {bf16: 1e12}, memory_bytes: 8e9, bandwidth: 1e11, scale_up_bandwidth: 1e10, nic_bandwidth: 1e9}\n"
    )
    catalogue = CATALOGUE.with_file(file)
    assert catalogue.get("H100").usd_per_hour == 2.5
    assert catalogue.get("H100").bandwidth == CATALOGUE.get("H100").bandwidth
    assert catalogue.get("toy").flops_in("bf16") == 1e12


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ({"flops": {"bf16": 1e12}}, "memory_bytes"),
        ({"flops": {"bf17": 1e12}}, "flops"),
        ({"colour": "green"}, "colour"),
        ({"flops": {"bf16": -1}}, "above 0"),
        ("fast", "mapping"),
    ],
)
def test_a_wrong_accelerator_is_named(entry, wrong):
    with pytest.raises(InvalidInput, match=wrong):
        CATALOGUE.extended({"toy": entry})


def test_an_unknown_accelerator_lists_the_known_ones():
    with pytest.raises(InvalidInput, match="H800"):
        CATALOGUE.get("H8OO")


def test_a_request_contributes_its_rows_at_growing_contexts():
    traffic = Traffic.of([RequestShape(prompt_tokens=100, output_tokens=50), RequestShape(prompt_tokens=10, output_tokens=400)])
    contexts = np.concatenate([np.arange(100, 150) + 0.5, np.arange(10, 410) + 0.5])
    assert traffic.mean_context == pytest.approx(contexts.mean())
    assert traffic.context_deviation == pytest.approx(contexts.std(), rel=1e-3)
    assert traffic.mean_prompt == 55
    assert traffic.mean_output == 225


def test_geometric_outputs_have_the_published_stationary_context():
    """arXiv 2601.21351: mean cached tokens of a slot are mu_P + mu_D when outputs are geometric."""
    rng = np.random.default_rng(4)
    outputs = rng.geometric(1 / 300, size=60_000)
    traffic = Traffic.of([RequestShape(prompt_tokens=200, output_tokens=int(o)) for o in outputs])
    assert traffic.mean_context == pytest.approx(200 + 300, rel=0.02)


def test_weights_count_as_repetitions():
    a, b = RequestShape(prompt_tokens=10, output_tokens=5), RequestShape(prompt_tokens=90, output_tokens=7)
    weighted = Traffic.of([RequestShape(prompt_tokens=10, output_tokens=5, weight=3), b])
    assert weighted.mean_context == pytest.approx(Traffic.of([a, a, a, b]).mean_context)
    assert weighted.prompt_quantile(0.75) == 10
    assert weighted.prompt_quantile(0.95) == 90


def test_a_context_becomes_requests_that_see_it():
    for context in (2, 100, 8192, 131072):
        assert Traffic.at_context(context).mean_context == pytest.approx(context, abs=1)


@pytest.mark.parametrize(("context", "output", "prompt"), [(8192, 1000, 7692), (1000, 1500, 250), (1, 1, 1)])
def test_answers_keep_the_length_that_was_asked_for(context, output, prompt):
    (request,) = Traffic.at_context(context, output).requests
    assert (request.prompt_tokens, request.output_tokens) == (prompt, output)


def test_answers_too_long_for_the_context_are_refused():
    """They were cut to it, and nobody said so."""
    with pytest.raises(InvalidInput, match=r"output_tokens.*raise context") as refused:
        Traffic.at_context(1000, 2500)
    assert refused.value.field == "output_tokens"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_trace_is_read(tmp_path, suffix):
    file = tmp_path / f"trace.{suffix}"
    if suffix == "csv":
        file.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,20\n1.5,300,40\n")
    else:
        rows = [
            {"arrival_s": 0.5, "prompt_tokens": 100, "output_tokens": 20},
            {"arrival_s": 1.5, "prompt_tokens": 300, "output_tokens": 40},
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
    traffic = Traffic.from_trace(file)
    assert [(r.prompt_tokens, r.output_tokens, r.arrival_s) for r in traffic.requests] == [(100, 20, 0.5), (300, 40, 1.5)]


@pytest.mark.parametrize("text", ["prompt_tokens\n5\n", "", "prompt_tokens,output_tokens\n5,many\n", '{"prompt_tokens": 0}'])
def test_a_wrong_trace_is_refused(tmp_path, text):
    (tmp_path / "t").write_text(text)
    with pytest.raises(InvalidInput):
        Traffic.from_trace(tmp_path / "t")


def test_one_ffn_node_receives_three_bytes_per_hidden_value():
    """arXiv 2507.19427 section 5.4: 8 bits out and 16 back, 3 H B bytes a server, layer and ubatch."""
    model, card = find_model("step-3"), CATALOGUE.get("H800")
    moved = exchange(
        model.shape.experts, model.shape.hidden_size, model.formats, rows=2048, attention=card, num_attention=8,
        ffn_card=card, num_ffn=8, colocated=False, network_efficiency=1.0, latency_s=0.0,
    )  # fmt: skip
    assert moved.node_bytes == 3 * 7168 * 2048
    assert moved.total_s >= 3 * 7168 * 2048 / 4e11


def test_cards_of_one_node_exchange_over_their_scale_up_links_only():
    model, card = find_model("step-3"), CATALOGUE.get("H800")
    common = {"rows": 512.0, "attention": card, "ffn_card": card, "network_efficiency": 1.0, "latency_s": 0.0}
    ffn, hidden = model.shape.experts, model.shape.hidden_size
    inside = exchange(ffn, hidden, model.formats, num_attention=8, num_ffn=8, colocated=True, **common)
    alone = exchange(ffn, hidden, model.formats, num_attention=1, num_ffn=1, colocated=True, **common)
    assert inside.node_bytes == 0
    assert inside.total_s > 0
    assert alone.total_s == 0


def test_a_quarter_slower_network_asks_for_a_quarter_denser_mixture():
    """arXiv 2507.19427 section 5.4: 40 of 50 GB/s per card raise H800's bound from 0.058 to 0.073."""
    model, card = find_model("step-3"), CATALOGUE.get("H800")
    bound = min_sparsity(card, model.shape, model.formats, tpot_s=0.05, network_efficiency=0.8)
    assert round(bound, 3) == 0.073


def test_roles_without_a_card_get_the_cheapest_of_the_fleet():
    model = find_model("step-3")
    cards = assign(model, model.formats, 8192, CATALOGUE.priced, {"prefill": CATALOGUE.get("A800")})
    assert (cards.attention.key, cards.ffn.key, cards.prefill.key) == ("H20", "H800", "A800")
    with pytest.raises(InvalidInput, match="role"):
        assign(model, model.formats, 8192, CATALOGUE.priced, {"cook": CATALOGUE.get("A800")})


def test_this_machine_is_measured_and_computes_in_fp32():
    card = measure_local(usd_per_hour=0.1, seconds_each=0.2)
    assert card.compute_format("bf16") == "fp32"
    assert card.flops["fp32"] > 1e9
    assert card.bandwidth > 1e8
    assert card.memory_bytes > 1e9
