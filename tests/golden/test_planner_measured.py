"""Published measurements beside the planner's prediction at the same batch: within 20 %, or off for a reason that is named.

The same table stands in deploy/docs/planner.md with what the planner said before, and is held to what is predicted. Nothing here is
fitted by point: constants are ``Efficiency``'s defaults, each with a source of its own, and Hopper's 64-row matrix units.

Sources: attention stages and Step-3, arXiv 2507.19427 tables 8 and 9; dispatch and combine, DeepEP's README (low-latency kernels,
H800, 128 tokens a card); DeepSeek-V3 on 128 H800, deepseek-ai/profile-data as given in table 8; 72-way expert parallelism, LMSYS
"large-scale EP" of 2025-05-05; FastAFD on GB200, Hao AI Lab 2026-07-06.
"""

import dataclasses
import re
from pathlib import Path

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
# Step-3 with 8-bit attention and two FFN servers: tokens/s a card by context, attention cards, rows a card and ubatch.
STEP_3_FP8 = {(4096, 16, 128): 4039, (8192, 32, 64): 2643}
# FastAFD over colocated, by context, attention cards, rows a card and ubatch, rows a card colocated.
FASTAFD = {(8192, 28, 48, 64): 1.41, (16384, 44, 24, 32): 1.44}


def decoding(name, attention, ffn=None, *, context, kv="bf16"):
    model = find_model(name)
    formats = dataclasses.replace(model.formats, kv=kv, local_kv=kv)
    cards = {"attention": attention, "ffn": attention if ffn is None else ffn}
    return DecodeModel(
        stages=Roofline(shape=model.shape, formats=formats, efficiency=Efficiency(), **cards), contexts=Contexts(mean=context)
    )


def per_card(model, layout, rows):
    return model.point(layout, rows).tokens_per_s / layout.num_cards


def attention_us(name, card, context):
    """One attention layer at 64 requests a card."""
    stages = decoding(name, CATALOGUE.get(card), context=context).stages
    attention = stages.shape.kinds[-1][0].attention
    alone = Layer(attention=attention, ffn=FFN.dense(1, 1))  # the published layer has no router
    return 1e6 * stages.attention_s(alone, 64, context)


def all_to_all_us(cards):
    """Dispatch and combine at 128 rows a card."""
    model, card = find_model("deepseek-v3"), CATALOGUE.get("H800")
    moved = exchange(
        model.shape.experts, model.shape.hidden_size, model.formats, rows=128 * cards, attention=card, num_attention=cards,
        ffn_card=card, num_ffn=cards, colocated=True, network_efficiency=Efficiency().network,
        latency_s=Efficiency().link_latency_s,
    )  # fmt: skip
    return 1e6 * moved.a2f_s, 1e6 * moved.f2a_s


def deepseek_on_128_h800():
    """128 requests a card in two ubatches at 4,096; tokens/s a card."""
    model = decoding("deepseek-v3", CATALOGUE.get("H800"), context=4096)
    return per_card(model, Layout(num_attention=128, num_ffn=128, num_ubatches=2, colocated=True), 64)


def deepseek_on_72_h100(num_ubatches=2):
    """256 requests a card, prompts of 2,000 and outputs of 100; tokens/s a node of eight."""
    model = decoding("deepseek-v3", CATALOGUE.get("H100"), context=2050)
    layout = Layout(num_attention=72, num_ffn=72, num_ubatches=num_ubatches, colocated=True)
    return 8 * per_card(model, layout, 256 // num_ubatches)


def step_3(context, attention_cards, rows, kv):
    """Attention servers and two FFN servers of H800 with three ubatches; tokens/s a card."""
    model = decoding("step-3", CATALOGUE.get("H800"), context=context, kv=kv)
    return per_card(model, Layout(num_attention=attention_cards, num_ffn=16, num_ubatches=3), rows)


def fastafd(context, attention_cards, rows, colocated_rows):
    """Qwen3-235B on nodes of four GB200, two ubatches, over four cards that do both."""
    model = decoding("qwen3-235b-a22b", CATALOGUE.get("GB200"), context=context)
    apart = per_card(model, Layout(num_attention=attention_cards, num_ffn=4, num_ubatches=2), rows)
    return apart / per_card(model, Layout(num_attention=4, num_ffn=4, num_ubatches=1, colocated=True), colocated_rows)


@pytest.mark.parametrize(("name", "card", "context"), STAGES_US)
def test_an_attention_stage_takes_the_published_time(name, card, context):
    assert attention_us(name, card, context) == pytest.approx(STAGES_US[name, card, context], rel=NEAR)


@pytest.mark.parametrize("cards", ALL_TO_ALL_US)
def test_dispatch_and_combine_take_the_published_times(cards):
    assert all_to_all_us(cards) == pytest.approx(ALL_TO_ALL_US[cards], rel=NEAR)


def test_deepseek_v3_on_128_h800_decodes_at_the_published_rate():
    assert deepseek_on_128_h800() == pytest.approx(2324, rel=NEAR)


def test_72_way_expert_parallelism_decodes_at_the_published_rate():
    assert deepseek_on_72_h100() == pytest.approx(22_282, rel=NEAR)


def test_two_ubatches_gain_what_was_published_for_them():
    """Two-batch overlap at 256 requests a card: 22,310 tokens/s a node against 25.5 % less without."""
    assert deepseek_on_72_h100() / deepseek_on_72_h100(num_ubatches=1) == pytest.approx(1.255, rel=0.1)


def test_step_3_with_16_bit_attention_decodes_at_the_published_rate():
    """Batch 6,144 in three ubatches."""
    assert step_3(4096, 24, 85, "bf16") == pytest.approx(3321, rel=NEAR)


@pytest.mark.parametrize(("context", "attention_cards", "rows"), STEP_3_FP8)
def test_step_3_with_8_bit_attention_is_the_named_exception(context, attention_cards, rows):
    """An 8-bit cache halves what is read, and the planner counts that; published, it brought 18 % in all (section 7.3)."""
    published = STEP_3_FP8[context, attention_cards, rows]
    assert 1.2 < step_3(context, attention_cards, rows, "fp8") / published < 1.3


@pytest.mark.parametrize("run", FASTAFD)
def test_fastafd_gains_what_was_published_over_colocated(run):
    """7:1 and 11:1 nodes."""
    assert fastafd(*run) == pytest.approx(FASTAFD[run], rel=NEAR)


def test_the_page_says_what_is_predicted():
    """Each line of the planner's page: published figures, and in its last column those that are predicted for them today."""
    expected = [(f"{published}", f"{attention_us(*stage):.0f}") for stage, published in STAGES_US.items()]
    for cards in (16, 128):
        for published, ours in zip(ALL_TO_ALL_US[cards], all_to_all_us(cards), strict=True):
            expected.append((f"{published}", f"{ours:.0f}"))
    expected += [("2,324", f"{deepseek_on_128_h800():,.0f}"), ("22,282", f"{deepseek_on_72_h100():,.0f}")]
    expected.append(("3,321", f"{step_3(4096, 24, 85, 'bf16'):,.0f}"))
    expected += [(f"{published:,}", f"{step_3(*run, 'fp8'):,.0f}") for run, published in STEP_3_FP8.items()]
    expected += [(f"{published:.2f}", f"{fastafd(*run):.2f}") for run, published in FASTAFD.items()]
    page = (Path(__file__).parents[2] / "deploy" / "docs" / "planner.md").read_text(encoding="utf-8")
    section = page.split("### Beside what was published")[1].split("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\|.*\d", line)]
    said = [pair for cells in lines for pair in zip(cells[1].split(" / "), cells[-1].split(" / "), strict=True)]
    assert sorted(said) == sorted(expected)
