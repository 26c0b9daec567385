"""Models and accelerators of the library: sizes as their cards say, sources, and listings that fit a terminal."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model, model_names
from antiphon.planner.cost.model_cost import model_cost

# Billions of parameters and, activated, by the models' cards; the tolerance is what they round to.
SIZES = {
    "llama-3.1-8b": (8.03, None, 0.002),
    "llama-3.3-70b": (70.6, None, 0.002),
    "gpt-oss-120b": (116.8, 5.1, 0.005),
    "gpt-oss-20b": (20.9, 3.6, 0.005),
    "step-3.7-flash": (196, 11, 0.006),
    "gemma-2-27b": (27.2, None, 0.002),
    "qwen3-next-80b-a3b": (80, 3, 0.006),
    "qwen3.5-27b": (27, None, 0.006),
    "kimi-linear-48b-a3b": (48, 3, 0.025),
    "glm-4.5": (355, 32, 0.02),
    "glm-4.5-air": (106, 12, 0.02),
}
# Data sheets: dense BF16 and FP8 Tflop/s, GB, TB/s.
SHEETS = {
    "B200": (2250, 4500, 180, 7.7),
    "GB200": (2500, 5000, 186, 8.0),
    "MI300X": (1307, 2615, 192, 5.3),
    "910C": (752, None, 128, 3.2),
    "L40S": (362, 733, 48, 0.864),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_the_parameters_of_its_card(name):
    total, _, near = SIZES[name]
    assert find_model(name).shape.total_weights / 1e9 == pytest.approx(total, rel=near)


@pytest.mark.parametrize("key", SHEETS)
def test_an_accelerator_has_the_figures_of_its_data_sheet(key):
    card, (bf16, fp8, gigabytes, terabytes) = Catalogue.built_in().get(key), SHEETS[key]
    assert round(card.flops["bf16"] / 1e12) == bf16
    assert (round(card.flops["fp8"] / 1e12) if "fp8" in card.flops else None) == fp8
    assert (card.memory_bytes / 1e9, card.bandwidth / 1e12) == (gigabytes, terabytes)


@pytest.mark.parametrize("card", Catalogue.built_in().accelerators.values(), ids=lambda card: card.key)
def test_rates_are_dense_and_double_with_every_halving_of_a_value(card):
    """A sparse figure taken for a dense one would be off by two; formats that a card has not are computed in a wider one."""
    for name, times in (("fp8", 2), ("int8", 2), ("fp4", 4)):
        if name in card.flops:
            assert card.flops[name] / card.flops["bf16"] == pytest.approx(times, rel=0.03)
    assert card.flops_in("int4") == card.flops_in("int8") >= card.flops_in("bf16")


def test_everything_names_its_source():
    assert all(card.source for card in Catalogue.built_in().accelerators.values())
    assert all(find_model(name).source for name in model_names())


def test_sparse_attention_attends_what_its_indexer_picks_and_caches_everything():
    """DeepSeek-V3.2: 64 indexer heads of 128 score every cached token in 8 bits; 2,048 of them are attended."""
    dense, sparse = find_model("deepseek-v3"), find_model("deepseek-v3.2")
    near, far = (model_cost(sparse.shape, sparse.formats, context).decode for context in (2048, 131072))
    layers, more = 61, 131072 - 2048
    assert far.kv_bytes - near.kv_bytes == layers * 128 * more
    assert far.attention_flops - near.attention_flops == layers * 2 * 64 * 128 * more
    cached = [model_cost(model.shape, model.formats, 131072).cache_bytes for model in (dense, sparse)]
    assert cached[1] - cached[0] == layers * 128 * 131072
    assert far.kv_bytes < 0.3 * model_cost(dense.shape, dense.formats, 131072).decode.kv_bytes


def test_windows_leave_the_cache_of_step_3_7_at_a_published_share():
    """At 16,384 tokens, 0.2896 of a cache without windows: 33 layers hold 512 tokens, 12 all (NVIDIA aiconfigurator, Step-3.7)."""
    model = find_model("step-3.7-flash")
    cost = model_cost(model.shape, model.formats, 16384)
    layer_token_bytes = 2 * 8 * 128 * 2
    assert cost.cache_bytes / (45 * 16384 * layer_token_bytes) == pytest.approx(0.2896, abs=1e-4)


@pytest.mark.parametrize("context", [4096, 131072])
def test_gpt_oss_reads_half_its_layers_caches_within_a_window_of_128(context):
    """The card (arXiv 2508.10925 §2.1): layers alternate between banded windows of 128 tokens and all; 8 KV heads of 64."""
    model = find_model("gpt-oss-120b")
    read = model_cost(model.shape, model.formats, context).decode.kv_bytes
    assert read == 18 * (128 + context) * 2 * 8 * 64 * 2


@pytest.mark.parametrize("listing", ["hardware", "models"])
def test_a_listing_is_readable_at_80_columns(listing):
    result = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [listing])
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("│")]
    names = list(Catalogue.built_in().accelerators) if listing == "hardware" else list(model_names())
    # One line a row: nothing is folded.
    assert [row.split("│")[1].strip() for row in rows] == names


def test_the_library_is_found_in_an_installed_package():
    script = "import json; from antiphon.planner.cost.library import model_names; print(json.dumps(model_names()))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd="/")
    assert json.loads(shown.stdout) == list(model_names())
