"""The command's contract: JSON fields, exit codes, one-line errors."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.core.errors import InvalidInput, UnknownModel

DOCUMENT = """
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata: {name: big}
spec:
  model: {uri: "hf://Qwen/Qwen3-30B-A3B"}
  topology: pd-afd
  pools:
    - {name: p, role: prefill, resources: {gpu: 1}}
    - {name: a, role: attention, resources: {gpu: 1}}
    - {name: f, role: ffn, resources: {gpu: 1}}
  slo: {tpotMs: 50, ttftMs: 2000}
  gpuBudget: 32
  planning:
    hardware: {fleet: [H800], attention: H20}
    traffic: [{promptTokens: 1500, outputTokens: 700}]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "doc.yaml"
    file.write_text(DOCUMENT)
    return file


def test_cost_prints_the_contract():
    result = run("cost", "--model", "deepseek-v3", "--context", "8192", "--json")
    value = json.loads(result.stdout)
    assert {"model", "context", "kv_bytes_per_token", "attention_flops", "linear_flops", "ffn_flops", "best"} <= set(value)
    assert (value["model"], value["context"]) == ("deepseek-v3", 8192)
    assert value["kv_bytes_per_token"] == pytest.approx(2.88e8, rel=0.005)
    assert set(value["attention_usd_per_mtok"]) == set(value["ffn_usd_per_mtok"]) == {"H800", "H20", "A800", "910B"}
    assert round(value["best"]["usd_per_mtok"], 3) == 0.068


def test_cost_explains_itself_for_people():
    result = run("cost", "--model", "step-3", "--explain")
    assert "attention_usd = " in result.stdout
    assert "max(attention_flops * usd_per_flop" in result.stdout


def test_a_plan_of_a_document_takes_targets_budget_and_hardware_from_it(document):
    value = json.loads(run("deploy", "-f", document, "--json").stdout)
    assert value["model"] == "qwen3-30b-a3b"
    assert value["demand"]["tpot_ms"] == 50
    assert value["demand"]["gpu_budget"] == 32
    assert value["hardware"] == {"colocated": "H800", "prefill": "H800", "decode": "H800", "attention": "H20", "ffn": "H800"}
    assert value["verdict"] in ("afd", "pd", "colocated")
    assert value["chosen"]["num_cards"] <= 32
    assert value["chosen"]["binding"]


def test_options_win_over_the_document(document):
    value = json.loads(run("deploy", "-f", document, "--gpus", 20, "--tpot-ms", 80, "--role", "ffn=H20", "--json").stdout)
    assert (value["demand"]["gpu_budget"], value["demand"]["tpot_ms"], value["hardware"]["ffn"]) == (20, 80, "H20")


def test_a_plan_needs_no_document():
    result = run("deploy", "--model", "mixtral-8x7b", "--gpus", 8, "--hardware", "H800", "--context", 2048)
    assert result.exit_code == 0
    assert "TPOT" in result.stdout
    assert "rows that meet" in result.stdout


def test_an_infeasible_plan_exits_with_one_and_says_the_constraint(document):
    result = run("deploy", "-f", document, "--tpot-ms", 0.01, "--json")
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert value["verdict"] == "infeasible"
    assert value["infeasible"]["afd"][0]["constraint"] == "tpot"
    assert value["infeasible"]["afd"][0]["by"] > 0


def test_the_explanation_is_part_of_the_json(document):
    value = json.loads(run("deploy", "-f", document, "--explain", "--json").stdout)
    assert {"section", "formula", "values", "result", "unit"} <= set(value["explanation"][0])


def test_a_plan_is_simulated(document):
    result = run("simulate", "-f", document, "--rate", 5, "--duration-s", 60, "--warm-up-s", 20, "--json")
    value = json.loads(result.stdout)
    assert value["simulation"]["num_finished"] > 0
    assert set(value["simulation"]["ttft_ms"]) == {"p50", "p90", "p95", "p99"}


def test_measurements_are_fitted_and_compared(tmp_path):
    file = tmp_path / "bench.jsonl"
    records = [
        {"model": "m", "wiring": "monolith", "batch": b, "context": 100, "decode_step_s": 0.01 + 0.001 * b}
        for b in (1, 2, 4, 8, 16)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    value = json.loads(run("calibrate", "-i", file, "--hold-out", "4", "--json").stdout)
    (held_out,) = [c for c in value["comparisons"] if c["held_out"]]
    assert abs(held_out["error"]) < 0.05


def test_hardware_and_models_are_listed():
    cards = json.loads(run("hardware", "--json").stdout)
    assert cards["H800"]["usd_per_hour"] == 2.0
    listing = json.loads(run("models", "--json").stdout)
    assert listing["smollm2-135m"]["parameters"] == 134_515_008


def test_wrong_options_are_errors_of_the_tree(document):
    with pytest.raises(UnknownModel):
        run("cost", "--model", "nobody")
    with pytest.raises(InvalidInput, match="ROLE=ACCELERATOR"):
        run("deploy", "-f", document, "--role", "ffn")
    with pytest.raises(InvalidInput, match="batch sizes"):
        run("calibrate", "-i", document, "--hold-out", "one")


def test_a_model_that_is_not_in_the_library_asks_for_its_config(tmp_path):
    file = tmp_path / "doc.yaml"
    file.write_text(DOCUMENT.replace("Qwen/Qwen3-30B-A3B", "acme/secret"))
    with pytest.raises(InvalidInput, match=r"spec\.planning\.config"):
        run("deploy", "-f", file)


def test_help_imports_neither_arithmetic_nor_plots():
    script = "import sys, antiphon.cli.plan; print([m for m in ('numpy', 'matplotlib', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_a_plan_says_the_traffic_it_is_for(tmp_path):
    page = tmp_path / "plan.html"
    arguments = ["--model", "mixtral-8x7b", "--gpus", 8, "--hardware", "H800", "--context", 2048, "--output-tokens", 96]
    shown = " ".join(run("deploy", *arguments, "--html", page).stdout.split())
    assert "prompts of 2,000 and outputs of 96 tokens" in shown
    assert "context of 2,048 tokens" in shown
    assert "prompts of 2,000 and outputs of 96 tokens" in page.read_text()
    assert "prompts are shorter than this by half" in " ".join(run("deploy", "--help").stdout.replace("│", " ").split())


def test_a_plan_says_what_the_model_is_served_in():
    """Mixtral is published in bf16 and planned in fp8 by default: nobody may have to guess it from the memory."""
    shown = " ".join(run("deploy", "--model", "mixtral-8x7b", "--gpus", 8, "--kv", "bf16").stdout.split())
    assert "formats: weights fp8, products with them fp8, attention bf16, KV cache bf16" in shown


def test_one_card_is_a_card_and_wirings_without_a_prefill_pool_have_no_ratio():
    shown = " ".join(run("deploy", "--model", "gpt-oss-20b", "--gpus", 1, "--hardware", "L40S").stdout.split())
    assert "needs 2 cards, has 1 card (off by 1 card)" in shown
    assert "prefill : decode cards │ - │" in shown
