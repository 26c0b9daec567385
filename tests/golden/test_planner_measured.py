"""Published measurements beside the planner's prediction at the same batch: within 20 %, or off for a reason that is named.

The same table stands in deploy/docs/planner.md with what the planner said before. Nothing here is fitted by point: constants are
``Efficiency``'s defaults, each with a source of its own, and Hopper's 64-row matrix units.

Sources: attention stages and Step-3, arXiv 2507.19427 tables 8 and 9; dispatch and combine, DeepEP's README (low-latency kernels,
H800, 128 tokens a card); DeepSeek-V3 on 128 H800, deepseek-ai/profile-data as given in table 8; 72-way expert parallelism, LMSYS
"large-scale EP" of 2025-05-05; FastAFD on GB200, Hao AI Lab 2026-07-06.
"""

import dataclasses

import pytest

from antiphon.planner.cost.hardware import Catalogue, Efficiency
from antiphon.planner.cost.library import find_model
from antiphon.planner.cost.shape import FFN, Layer
from antiphon.planner.pipeline.fabric import exchange
from antiphon.planner.pipeline.group import Contexts, DecodeModel, Layout
from antiphon.planner.pipeline.stages import Roofline

CATALOGUE = Catalogue.built_in()
NEAR = 0.20

# Table 9: one attention layer, 64 requests a card, BF16 attention; microseconds by model, card, context.
STAGES_US = {
    ("step-3", "H800", 8192): 281,
    ("step-3", "H20", 8192): 438,
    ("step-3", "A800", 8192): 531,
    ("deepseek-v3", "H800", 8192): 372,
    ("deepseek-v3", "H20", 8192): 1252,
    ("qwen3-235b-a22b", "H800", 8192): 382,
    ("qwen3-235b-a22b", "H20", 8192): 812,
    ("qwen3-235b-a22b", "A800", 8192): 791,
    ("step-3", "H800", 32768): 791,
    ("step-3", "H20", 32768): 1452,
    ("step-3", "A800", 32768): 1484,
    ("deepseek-v3", "H800", 32768): 1125,
    ("deepseek-v3", "H20", 32768): 4817,
    ("qwen3-235b-a22b", "H800", 32768): 1391,
    ("qwen3-235b-a22b", "H20", 32768): 3042,
    ("qwen3-235b-a22b", "A800", 32768): 3010,
}
# DeepEP: microseconds of dispatch (FP8) and combine (BF16) by cards.
ALL_TO_ALL_US = {16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369)}


def decoding(name, attention, ffn=None, *, context, kv="bf16"):
    model = find_model(name)
    formats = dataclasses.replace(model.formats, kv=kv, local_kv=kv)
    cards = {"attention": attention, "ffn": attention if ffn is None else ffn}
    return DecodeModel(
        stages=Roofline(shape=model.shape, formats=formats, efficiency=Efficiency(), **cards), contexts=Contexts(mean=context)
    )


def per_card(model, layout, rows):
    return model.point(layout, rows).tokens_per_s / layout.num_cards


@pytest.mark.parametrize(("name", "card", "context"), STAGES_US)
def test_an_attention_stage_takes_the_published_time(name, card, context):
    stages = decoding(name, CATALOGUE.get(card), context=context).stages
    attention = stages.shape.kinds[-1][0].attention
    alone = Layer(attention=attention, ffn=FFN.dense(1, 1))  # the published layer has no router
    assert 1e6 * stages.attention_s(alone, 64, context) == pytest.approx(STAGES_US[name, card, context], rel=NEAR)


@pytest.mark.parametrize("cards", ALL_TO_ALL_US)
def test_dispatch_and_combine_take_the_published_times(cards):
    model, card = find_model("deepseek-v3"), CATALOGUE.get("H800")
    moved = exchange(
        model.shape.experts, model.shape.hidden_size, model.formats, rows=128 * cards, attention=card, num_attention=cards,
        ffn_card=card, num_ffn=cards, colocated=True, network_efficiency=Efficiency().network,
        latency_s=Efficiency().link_latency_s,
    )  # fmt: skip
    assert (1e6 * moved.a2f_s, 1e6 * moved.f2a_s) == pytest.approx(ALL_TO_ALL_US[cards], rel=NEAR)


def test_deepseek_v3_on_128_h800_decodes_at_the_published_rate():
    """128 requests a card in two ubatches at 4,096: 2,324 tokens/s a card."""
    model = decoding("deepseek-v3", CATALOGUE.get("H800"), context=4096)
    layout = Layout(num_attention=128, num_ffn=128, num_ubatches=2, colocated=True)
    assert per_card(model, layout, 64) == pytest.approx(2324, rel=NEAR)


def test_72_way_expert_parallelism_decodes_at_the_published_rate():
    """256 requests a card in two ubatches, prompts of 2,000 and outputs of 100: 22,282 tokens/s a node of eight H100."""
    model = decoding("deepseek-v3", CATALOGUE.get("H100"), context=2050)
    layout = Layout(num_attention=72, num_ffn=72, num_ubatches=2, colocated=True)
    assert 8 * per_card(model, layout, 128) == pytest.approx(22_282, rel=NEAR)


def test_two_ubatches_gain_what_was_published_for_them():
    """Two-batch overlap at 256 requests a card: 22,310 tokens/s a node against 25.5 % less without."""
    model = decoding("deepseek-v3", CATALOGUE.get("H100"), context=2050)
    two = per_card(model, Layout(num_attention=72, num_ffn=72, num_ubatches=2, colocated=True), 128)
    one = per_card(model, Layout(num_attention=72, num_ffn=72, num_ubatches=1, colocated=True), 256)
    assert two / one == pytest.approx(1.255, rel=0.1)


def test_step_3_with_16_bit_attention_decodes_at_the_published_rate():
    """Three attention servers and two FFN servers of H800 at 4,096, batch 6,144 in three ubatches: 3,321 tokens/s a card."""
    model = decoding("step-3", CATALOGUE.get("H800"), context=4096)
    layout = Layout(num_attention=24, num_ffn=16, num_ubatches=3)
    assert per_card(model, layout, 85) == pytest.approx(3321, rel=NEAR)


@pytest.mark.parametrize(("context", "attention_cards", "rows", "published"), [(4096, 16, 128, 4039), (8192, 32, 64, 2643)])
def test_step_3_with_8_bit_attention_is_the_named_exception(context, attention_cards, rows, published):
    """An 8-bit cache halves what is read, and the planner counts that; published, it brought 18 % in all (section 7.3)."""
    model = decoding("step-3", CATALOGUE.get("H800"), context=context, kv="fp8")
    layout = Layout(num_attention=attention_cards, num_ffn=16, num_ubatches=3)
    assert 1.2 < per_card(model, layout, rows) / published < 1.3


@pytest.mark.parametrize(
    ("context", "attention_cards", "rows", "colocated_rows", "published"), [(8192, 28, 48, 64, 1.41), (16384, 44, 24, 32, 1.44)]
)
def test_fastafd_gains_what_was_published_over_colocated(context, attention_cards, rows, colocated_rows, published):
    """Qwen3-235B on GB200: 7:1 and 11:1 nodes of four with two ubatches, against four cards that do both."""
    model = decoding("qwen3-235b-a22b", CATALOGUE.get("GB200"), context=context)
    apart = per_card(model, Layout(num_attention=attention_cards, num_ffn=4, num_ubatches=2), rows)
    together = per_card(model, Layout(num_attention=4, num_ffn=4, num_ubatches=1, colocated=True), colocated_rows)
    assert apart / together == pytest.approx(published, rel=NEAR)
