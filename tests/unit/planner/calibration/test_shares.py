"""What is calibrated is what deploy plans with, from the CLI, a file or the document."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.core.errors import InvalidInput
from antiphon.planner.calibration.fit import Measurement
from antiphon.planner.calibration.shares import fit_shares
from antiphon.planner.cost.hardware import Catalogue, Efficiency
from antiphon.planner.cost.library import find_model
from antiphon.planner.pipeline.stages import Roofline

CARD = Catalogue.built_in().get("H800")
TRUE = Efficiency(compute=0.41, attention=0.55, memory=0.62, kv=0.71, network=0.5, kernel_s=7e-6, link_latency_s=2e-5)
DOCUMENT = """
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata: {name: big}
spec:
  model: {uri: "hf://Qwen/Qwen3-30B-A3B"}
  topology: monolith
  pools: [{name: m, role: monolith, resources: {gpu: 1}}]
  planning:
    efficiency: {memory: 0.5, kv: 0.6}
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(name="qwen3-32b"):
    """Stage times that a card with the true shares would take."""
    model = find_model(name)
    stages = Roofline(shape=model.shape, formats=model.formats, attention=CARD, ffn=CARD, efficiency=TRUE)
    layer = model.shape.kinds[-1][0]
    row = model.shape.hidden_size * 2 / (CARD.nic_bandwidth * TRUE.network)
    return [
        Measurement(
            model=name,
            wiring="1A1F",
            batch=batch,
            context=context,
            decode_step_s=1.0,
            num_layers=64,
            t_attention_s=stages.attention_s(layer, batch, context),
            t_ffn_s=stages.ffn_s(layer.ffn, batch, 1),
            t_transfer_s=batch * row + TRUE.link_latency_s,
        )
        for batch in (1, 4, 16, 64, 256, 1024)
        for context in (500, 4000)
    ]


def test_the_shares_behind_measured_stages_are_found():
    found = fit_shares(measured(), find_model("qwen3-32b"), CARD)
    for name in ("memory", "kv", "compute", "network", "kernel_s", "link_latency_s"):
        assert found[name] == pytest.approx(getattr(TRUE, name), rel=0.05), name


def test_what_calibrate_writes_is_what_deploy_plans_with(tmp_path):
    bench, fitted = tmp_path / "bench.jsonl", tmp_path / "shares.json"
    bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in measured()))
    result = run("calibrate", "-i", bench, "--model", "qwen3-32b", "--hardware", "H800", "-o", fitted)
    assert result.exit_code == 0, result.output
    assert "efficiency memory = 0.6" in result.stdout
    asked = ["deploy", "--model", "qwen3-32b", "--hardware", "H800", "--gpus", 8, "--context", 2000, "--json"]
    plain, calibrated = (json.loads(run(*asked, *more).stdout) for more in ([], ["--efficiency-file", fitted]))
    assert calibrated["assumptions"]["efficiency"]["memory"] == pytest.approx(0.62, rel=0.05)
    assert calibrated["chosen"]["tokens_per_s"] < plain["chosen"]["tokens_per_s"]


def test_options_win_over_the_file_and_the_document(tmp_path):
    document, shares = tmp_path / "d.yaml", tmp_path / "s.json"
    document.write_text(DOCUMENT)
    shares.write_text('{"efficiency": {"kv": 0.7, "compute": 0.3}}')
    asked = ["deploy", "-f", document, "--hardware", "H800", "--gpus", 4, "--json"]
    value = json.loads(run(*asked, "--efficiency-file", shares, "--efficiency", "compute=0.35").stdout)
    used = value["assumptions"]["efficiency"]
    assert (used["memory"], used["kv"], used["compute"], used["network"]) == (0.5, 0.7, 0.35, Efficiency().network)


@pytest.mark.parametrize("option", ["memory=2", "memory=nan", "speed=0.5", "memory", "memory=fast", "kernel_s=-1"])
def test_a_wrong_share_is_one_error(option):
    result = run("deploy", "--model", "qwen3-32b", "--hardware", "H800", "--gpus", 8, "--efficiency", option)
    assert isinstance(result.exception, InvalidInput)
    assert "efficiency" in str(result.exception.field)


def test_shares_need_stage_times_and_a_model(tmp_path):
    bench = tmp_path / "bench.jsonl"
    plain = [dataclasses.replace(one, t_ffn_s=None) for one in measured()]
    bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in plain))
    with pytest.raises(InvalidInput, match="stage times"):
        fit_shares(plain, find_model("qwen3-32b"), CARD)
    assert isinstance(run("calibrate", "-i", bench, "-o", tmp_path / "x").exception, InvalidInput)
