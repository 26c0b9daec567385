"""Attention shared by several cards: what splits, what is copied, and what it makes feasible."""

import json

import pytest
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.planner.cost.hardware import Catalogue, Efficiency
from antiphon.planner.cost.library import find_model
from antiphon.planner.pipeline.group import Contexts, DecodeModel, Layout
from antiphon.planner.pipeline.stages import Roofline

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
H800 = Catalogue.built_in().get("H800")


def stages(name, efficiency=None):
    model = find_model(name)
    return Roofline(shape=model.shape, formats=model.formats, attention=H800, ffn=H800, efficiency=efficiency or Efficiency())


@pytest.mark.parametrize("card", ["H100", "H800", "H200"])
def test_llama_70b_keeps_15_ms_on_eight_cards(tmp_path, card):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    arguments = ["deploy", "--model", str(tmp_path), "--gpus", "8", "--hardware", card, "--tpot-ms", "15", "--context", "2048"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    chosen = json.loads(result.stdout)["chosen"]
    assert result.exit_code == 0
    assert chosen["attention_tensor"] == 8
    assert chosen["tpot_ms"] <= 15
    # A step reads every weight once, 17.6 GB a card: it can't be shorter than that takes at the full bandwidth.
    assert chosen["tpot_ms"] > 1e3 * 141e9 / 8 / Catalogue.built_in().get(card).bandwidth


def test_cards_that_share_an_attention_split_its_work_and_pay_for_adding_up():
    ideal = stages("qwen3-32b", Efficiency.ideal())
    layer = ideal.shape.kinds[-1][0]
    alone, shared = ideal.attention_s(layer, 32, 8192), ideal.attention_s(layer, 32, 8192, tensor=8)
    assert shared == pytest.approx(alone / 8 + ideal.all_reduce_s(32, 8, H800))
    assert ideal.all_reduce_s(32, 8, H800) > 0
    assert ideal.all_reduce_s(32, 1, H800) == 0


def test_a_latent_cache_is_copied_to_every_card_that_shares_it():
    """MLA has one KV head for all queries (arXiv 2405.04434): more cards split the queries, not the cache."""
    ideal = stages("deepseek-v3", Efficiency.ideal())
    layer = ideal.shape.kinds[-1][0]
    assert layer.kv_parts(8) == 1
    model = DecodeModel(stages=ideal, contexts=Contexts(mean=8192))
    alone = model.memory(Layout(num_attention=8, num_ffn=8, num_ubatches=1), 16)[0]
    shared = model.memory(Layout(num_attention=8, num_ffn=8, num_ubatches=1, tensor=8), 16)[0]
    weights = ideal.shape.attention_side_weights
    assert alone - shared == pytest.approx(weights * 7 / 8)
    assert find_model("qwen3-32b").shape.layers[0].kv_parts(8) == 8
    assert find_model("qwen3-32b").shape.layers[0].kv_parts(16) == 8


def test_queries_that_do_not_fill_a_matrix_unit_cost_as_if_they_did():
    """Sixteen queries share a KV head: on Hopper, whose products have 64 rows at least, three quarters are thrown away."""
    ideal = stages("qwen3-235b-a22b", Efficiency.ideal())
    layer = ideal.shape.kinds[-1][0]
    flops, _ = ideal._core(layer, 1000, 1)
    assert flops == 4 * layer.attention.core_flops * 1000
    latent = stages("deepseek-v3", Efficiency.ideal())
    assert latent._core(latent.shape.kinds[-1][0], 1000, 1)[0] == latent.shape.kinds[-1][0].attention.core_flops * 1000


def test_one_rank_of_all_cards_sends_nothing_to_its_ffn_and_adds_up_once():
    model = DecodeModel(stages=stages("qwen3-32b"), contexts=Contexts(mean=2048))
    times = model.layer_times(Layout(num_attention=8, num_ffn=8, num_ubatches=1, colocated=True, tensor=8), 16)[-1].times
    assert times.a2f_s == 0
    assert times.f2a_s == pytest.approx(model.stages.all_reduce_s(16, 8, H800))


@pytest.mark.parametrize("more", [[], ["--ttft-ms", "2000", "--context", "4096", "--hardware", "H800"], ["--context", "2048"]])
def test_llama_70b_is_not_called_infeasible_for_the_card_or_the_chunk_that_was_tried_first(more):
    arguments = ["deploy", "--model", "llama-3.3-70b", "--gpus", "8", "--tpot-ms", "15", *more, "--json"]
    value = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert value["verdict"] == "colocated"
    assert value["chosen"]["tpot_ms"] <= 15
    if "--ttft-ms" in more:
        assert value["chosen"]["ttft_ms"] <= 2000
        assert value["chosen"]["prompt_room"] > 1.25
