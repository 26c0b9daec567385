"""Published figures that the planner must reproduce from model dimensions, to the precision they were printed in.

Source of every table here: "Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding",
arXiv 2507.19427, tables 2 to 7 and sections 4.2 and 5.1; sizes of models: their model cards. What models with states, windows
or sparse attention cost: beside each test.
"""

import pytest

from antiphon.planner.cost.hardware import Catalogue, roofline
from antiphon.planner.cost.library import find_model
from antiphon.planner.cost.model_cost import core_flops, model_cost
from antiphon.planner.cost.token_cost import token_cost, unit_cost
from antiphon.planner.pipeline.fabric import min_sparsity

CARDS = ("H800", "H20", "A800", "910B")

# Tables 2 (8K) and 3 (32K): KV or state bytes, attention FLOPs, projection FLOPs, FFN FLOPs per decoded token.
PER_TOKEN = {
    8192: {
        "deepseek-v3": (2.88e8, 1.47e11, 2.28e10, 4.84e10),
        "kimi-k2": (2.88e8, 7.37e10, 1.23e10, 4.84e10),
        "qwen3-235b-a22b": (7.89e8, 2.52e10, 1.34e10, 2.84e10),
        "qwen3-32b": (1.07e9, 1.72e10, 1.21e10, 5.03e10),
        "llama-4-maverick": (1.01e9, 8.05e9, 6.04e9, 2.42e10),
        "minimax-m1": (9.23e8, 3.42e9, 3.75e10, 5.44e10),
        "ernie-4.5": (9.06e8, 1.45e10, 1.63e10, 7.61e10),
        "pangu-pro-moe": (8.05e8, 8.05e9, 6.04e9, 2.38e10),
        "step-3": (2.56e8, 3.27e10, 2.07e10, 5.33e10),
    },
    32768: {
        "deepseek-v3": (1.15e9, 5.89e11, 2.28e10, 4.84e10),
        "kimi-k2": (1.15e9, 2.95e11, 1.23e10, 4.84e10),
        "qwen3-235b-a22b": (3.15e9, 1.01e11, 1.34e10, 2.84e10),
        "qwen3-32b": (4.29e9, 6.87e10, 1.21e10, 5.03e10),
        "llama-4-maverick": (2.21e9, 1.41e10, 6.04e9, 2.42e10),
        "minimax-m1": (1.93e9, 1.15e10, 3.75e10, 5.44e10),
        "ernie-4.5": (3.62e9, 5.80e10, 1.63e10, 7.61e10),
        "pangu-pro-moe": (3.22e9, 3.22e10, 6.04e9, 2.38e10),
        "step-3": (1.02e9, 1.31e11, 2.07e10, 5.33e10),
    },
}

# Table 6: USD per million tokens on H800, H20, A800, 910B: attention at 8K, attention at 32K, FFN.
USD = {
    "deepseek-v3": ((0.054, 0.128, 0.114, 0.113), (0.197, 0.460, 0.409, 0.407), (0.014, 0.036, 0.032, 0.032)),
    "kimi-k2": ((0.051, 0.065, 0.057, 0.057), (0.194, 0.231, 0.205, 0.204), (0.014, 0.036, 0.032, 0.032)),
    "qwen3-235b-a22b": ((0.135, 0.054, 0.091, 0.101), (0.527, 0.185, 0.338, 0.376), (0.008, 0.021, 0.019, 0.019)),
    "qwen3-32b": ((0.181, 0.069, 0.120, 0.133), (0.716, 0.248, 0.455, 0.508), (0.014, 0.038, 0.034, 0.033)),
    "llama-4-maverick": ((0.169, 0.060, 0.109, 0.121), (0.369, 0.128, 0.235, 0.262), (0.007, 0.018, 0.016, 0.016)),
    "minimax-m1": ((0.164, 0.079, 0.121, 0.132), (0.330, 0.135, 0.226, 0.249), (0.015, 0.041, 0.036, 0.036)),
    "ernie-4.5": ((0.155, 0.063, 0.105, 0.116), (0.606, 0.214, 0.388, 0.432), (0.021, 0.057, 0.051, 0.051)),
    "pangu-pro-moe": ((0.135, 0.049, 0.088, 0.098), (0.536, 0.183, 0.340, 0.379), (0.007, 0.018, 0.016, 0.016)),
    "step-3": ((0.048, 0.040, 0.040, 0.043), (0.176, 0.114, 0.120, 0.133), (0.015, 0.040, 0.036, 0.035)),
}

ROOFLINE = {"H800": 591, "H20": 74, "A800": 156, "910B": 175}  # table 4
UNIT_COST = {  # table 5: USD per FLOP and per byte
    "H800": (2.80e-19, 1.66e-16),
    "H20": (7.51e-19, 5.56e-17),
    "A800": (6.68e-19, 1.04e-16),
    "910B": (6.65e-19, 1.16e-16),
}
MIN_SPARSITY = {"H800": 0.058, "H20": 0.007, "A800": 0.031, "910B": 0.034}  # table 7: hidden 7168, 61 layers
INTENSITY = {"step-3": 128, "deepseek-v3": 512, "qwen3-235b-a22b": 32}  # section 5.1
TOTALS = {  # section 4.2, observation 1: the best deployment at 8K and 32K
    ("step-3", 8192): (0.055, "H20", "H800"),
    ("step-3", 32768): (0.129, "H20", "H800"),
    ("deepseek-v3", 8192): (0.068, "H800", "H800"),
    ("deepseek-v3", 32768): (0.211, "H800", "H800"),
    ("qwen3-235b-a22b", 8192): (0.062, "H20", "H800"),
    ("qwen3-235b-a22b", 32768): (0.193, "H20", "H800"),
}
# Model cards: parameters and, where a card counts embeddings out or rounds, what it prints; in billions.
SIZES = {
    "deepseek-v3": (671, 0),
    "qwen3-235b-a22b": (235, 0),
    "qwen3-32b": (32.8, 1),
    "qwen3-30b-a3b": (30.5, 1),
    "llama-4-maverick": (400, -1),
    "minimax-m1": (456, 0),
    "ernie-4.5": (300, -1),
    "pangu-pro-moe": (72, 0),
    "step-3": (316, 0),
    "mixtral-8x7b": (46.7, 1),
}


def cards():
    catalogue = Catalogue.built_in()
    return [catalogue.get(key) for key in CARDS]


def three_digits(value):
    return float(f"{value:.2e}")


@pytest.mark.parametrize("context", PER_TOKEN)
@pytest.mark.parametrize("name", PER_TOKEN[8192])
def test_bytes_and_operations_per_decoded_token_are_the_published_ones(name, context):
    model = find_model(name)
    row = model_cost(model.shape, model.formats, context).decode
    ours = (row.kv_bytes, row.attention_flops, row.linear_flops, row.ffn_flops)
    assert tuple(map(three_digits, ours)) == PER_TOKEN[context][name]


@pytest.mark.parametrize("name", USD)
def test_dollars_per_million_tokens_are_the_published_ones(name):
    model, (at_8k, at_32k, ffn) = find_model(name), USD[name]
    short, long = token_cost(model, cards(), 8192), token_cost(model, cards(), 32768)
    assert tuple(round(short.attention[key], 3) for key in CARDS) == at_8k
    assert tuple(round(long.attention[key], 3) for key in CARDS) == at_32k
    assert tuple(round(short.ffn[key], 3) for key in CARDS) == ffn


@pytest.mark.parametrize(("name", "context"), TOTALS)
def test_the_cheapest_mix_and_its_total_are_the_published_ones(name, context):
    cost = token_cost(find_model(name), cards(), context)
    assert (round(cost.afd_usd, 3), cost.best_attention, cost.best_ffn) == TOTALS[name, context]


@pytest.mark.parametrize("key", CARDS)
def test_unit_costs_and_rooflines_are_the_published_ones(key):
    card = Catalogue.built_in().get(key)
    unit = unit_cost(card, "fp8")
    # The print cuts H800's 2.806e-19 to 2.80 and rounds the others: one unit of the last digit either way.
    assert (unit.usd_per_flop, unit.usd_per_byte) == pytest.approx(UNIT_COST[key], rel=1 / 280)
    assert round(roofline(flops=card.flops_in("fp8"), bandwidth=card.bandwidth)) == ROOFLINE[key]


@pytest.mark.parametrize("key", CARDS)
def test_the_sparsest_mixture_that_a_fabric_can_feed_is_the_published_one(key):
    card, model = Catalogue.built_in().get(key), find_model("step-3")
    assert round(min_sparsity(card, model.shape, model.formats, tpot_s=0.050, num_stages=3), 3) == MIN_SPARSITY[key]


@pytest.mark.parametrize("name", INTENSITY)
def test_arithmetic_intensity_is_the_published_one(name):
    model = find_model(name)
    assert round(model_cost(model.shape, model.formats, 8192).arithmetic_intensity) == INTENSITY[name]


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_those_of_the_model_cards(name):
    published, digits = SIZES[name]
    ours = find_model(name).shape.total_weights / 1e9
    assert ours == pytest.approx(published, rel=0.005) if digits < 0 else round(ours, digits) == published


def test_smollm2_has_exactly_its_published_number_of_parameters():
    assert find_model("smollm2-135m").shape.total_weights == 134_515_008


def test_activated_parameters_of_minimax_m1_are_the_published_ones():
    shape = find_model("minimax-m1").shape  # 45.9 billion, embedding and head aside
    assert round((shape.activated_weights - shape.embedding_weights) / 1e9, 1) == 45.9


def cost_of(name, context):
    model = find_model(name)
    return model_cost(model.shape, model.formats, context)


def state_bytes(name):
    cost = cost_of(name, 1)
    return cost.cache_bytes - cost.kv_bytes_per_cached_token


def test_kimi_linear_saves_the_published_share_of_the_cache():
    """Up to 75 % (arXiv 2510.26692): three layers with a state to one with a latent, and a last one, so 20 of 27."""
    far = cost_of("kimi-linear-48b-a3b", 1_048_576)
    every_layer_latent = 27 * (512 + 64) * 2 * 1_048_576
    assert 1 - far.cache_bytes / every_layer_latent == pytest.approx(0.75, abs=0.015)


def test_kimi_linear_at_a_million_tokens_takes_what_was_measured():
    """llama.cpp keeps 14.875 GiB in fp16 for 1,048,576 tokens: of each latent 576 values as keys, and 512 once more as values."""
    growing = cost_of("kimi-linear-48b-a3b", 1_048_576).kv_bytes_per_cached_token * 1_048_576
    assert growing == 14.875 * 2**30 * 576 / (576 + 512)


def test_qwen3_5_has_the_state_that_was_measured():
    """ggml-org/llama.cpp#23792, 27B: 448.88 MiB of states for three sequences, 16.88 MiB of them of convolutions."""
    assert 3 * state_bytes("qwen3.5-27b") / 2**20 == pytest.approx(448.88, abs=0.01)


@pytest.mark.parametrize("context", [131_072, 262_144])
def test_qwen3_next_reads_a_tenth_of_qwen3_32b_beyond_its_published_context(context):
    """Its card: over ten times the throughput of Qwen3-32B where contexts are longer than 32K tokens."""
    dense, hybrid = find_model("qwen3-32b"), find_model("qwen3-next-80b-a3b")
    read = [model_cost(model.shape, hybrid.formats, context).decode.kv_bytes for model in (dense, hybrid)]
    assert read[0] > 10 * read[1]


def test_deepseek_v3_2_computes_what_its_published_sparse_attention_does():
    """DeepSeek-V3.2's report: an indexer of 64 heads of 128 over all L tokens, attention over the 2,048 chosen."""
    dense, sparse = find_model("deepseek-v3").shape, find_model("deepseek-v3.2").shape
    full, chosen = (sum(count * core_flops(layer, 131_072) for layer, count in shape.kinds) for shape in (dense, sparse))
    per_token, index = 2 * 128 * (576 + 512), 2 * 64 * 128
    assert full / chosen == pytest.approx(per_token * 131_072 / (index * 131_072 + per_token * 2048))
