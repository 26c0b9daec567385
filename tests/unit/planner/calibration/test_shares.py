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


def test_shares_of_a_measured_machine_bring_its_peaks_along(tmp_path, monkeypatch):
    """This machine is measured anew by every command, and is never the same: shares of one are none of the other."""
    bench, fitted = tmp_path / "bench.jsonl", tmp_path / "shares.json"
    bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in measured()))
    here = dataclasses.replace(CARD, key="local", source="measured")
    monkeypatch.setattr("antiphon.planner.cost.local_machine.measure_local", lambda *_: here)
    assert run("calibrate", "-i", bench, "--model", "qwen3-32b", "-o", fitted).exit_code == 0
    busy = dataclasses.replace(here, bandwidth=here.bandwidth / 9)
    monkeypatch.setattr("antiphon.planner.question.measure_local", lambda *_: busy)
    asked = ["deploy", "--model", "qwen3-32b", "--hardware", "local", "--gpus", 4, "--context", 2000, "--json"]
    rate = json.loads(run(*asked, "--efficiency-file", fitted).stdout)["chosen"]["tokens_per_s"]
    same = json.loads(run("deploy", "--hardware", "H800", *asked[1:3], *asked[5:], "--efficiency-file", fitted).stdout)["chosen"]
    assert rate == pytest.approx(same["tokens_per_s"])
    assert rate > 2 * json.loads(run(*asked).stdout)["chosen"]["tokens_per_s"]
    priced = json.loads(run(*asked, "--efficiency-file", fitted, "--price", 2).stdout)["chosen"]
    assert priced["usd_per_hour"] == 8
    # What a file of accelerators says of it still wins.
    cards = tmp_path / "cards.json"
    cards.write_text(json.dumps({"local": {**dataclasses.asdict(busy), "title": "slow"}} | {}).replace('"key": "local", ', ""))
    slow = json.loads(run(*asked, "--efficiency-file", fitted, "--hardware-file", cards).stdout)["chosen"]
    assert slow["tokens_per_s"] < rate / 2


def test_calibrate_says_how_well_the_shares_fit_and_what_they_leave(tmp_path):
    bench = tmp_path / "bench.jsonl"
    bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in measured()))
    shown = " ".join(run("calibrate", "-i", bench, "--model", "qwen3-32b", "--hardware", "H800").stdout.split())
    assert "stage times with these: off by 0% on average" in shown
    assert "overlap: not to be told from these" in shown
    assert "qwen3-32b" in shown.split("wiring")[0]  # once, in the title


def test_measurements_that_scatter_are_said_to(tmp_path):
    points = measured()
    scattered = [dataclasses.replace(one, decode_step_s=0.1 * (1 + 9 * (i % 2))) for i, one in enumerate(points)]
    for kept, warned in ((points, False), (scattered, True)):
        bench = tmp_path / "bench.jsonl"
        bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in kept))
        result = run("calibrate", "-i", bench)
        assert result.exit_code == 0
        assert ("the measurements scatter" in " ".join(result.stdout.split())) == warned


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--hold-out", "4,5"], "hold_out: 5 was not measured"), (["--hardware", "H800"], "hardware: needs model")],
)
def test_an_option_of_calibrate_without_effect_is_refused(tmp_path, options, said):
    bench = tmp_path / "bench.jsonl"
    bench.write_text("\n".join(json.dumps(dataclasses.asdict(one)) for one in measured()))
    result = run("calibrate", "-i", bench, *options)
    assert isinstance(result.exception, InvalidInput)
    assert said in str(result.exception)


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
