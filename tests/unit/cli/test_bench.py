"""``antiphon bench``: what it refuses, and traces put together from files."""

import json

import pytest
from typer.testing import CliRunner

from antiphon.cli.bench import app
from antiphon.core.errors import InvalidInput
from antiphon.telemetry.step_trace import Mark, StepTrace, save


def left_by_workers(directory):
    """An attention worker and an FFN worker whose clock is a thousand seconds ahead; one exchange."""
    attention, ffn = StepTrace(), StepTrace()
    attention.add(Mark.SEND, 1.0, 1.0001, step=5, layer=0, ubatch=0, rows=4)
    attention.add(Mark.RECEIVE, 1.0002, 1.001, step=5, layer=0, ubatch=0)
    attention.add(Mark.STEP, 0.999, 1.002, step=5, rows=4)
    ffn.add(Mark.ROWS, 1001.0003, 1001.0007, step=5, layer=0, ubatch=0, rows=4, peer="d/attention/0")
    ffn.add(Mark.COMPUTE, 1001.0004, 1001.0008, layer=0, rows=4)
    save(attention.taken(worker="d/attention/0", role="attention"), directory, epoch=1)
    save(ffn.taken(worker="d/ffn/0", role="ffn"), directory, epoch=1)


def test_traces_of_a_directory_become_one_time_line(tmp_path):
    left_by_workers(tmp_path / "steps")
    out = tmp_path / "steps.json"
    result = CliRunner().invoke(app, ["trace", str(tmp_path / "steps"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 workers" in result.output
    timeline = json.loads(out.read_text())
    arrow = {event["ph"]: event["ts"] for event in timeline["traceEvents"] if event["ph"] in ("s", "t", "f")}
    assert arrow["s"] < arrow["t"] < arrow["f"]
    # Rows were away for a millisecond, of which the FFN side accounts for 0.4: the offset is known to 0.3.
    clock = timeline["otherData"]["clocks"]["d/ffn/0"]
    assert clock["uncertainty_us"] == pytest.approx(300, abs=1)
    assert clock["offset_us"] == pytest.approx(1e9, abs=301)


def test_a_directory_without_traces_is_refused_with_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert isinstance(result.exception, InvalidInput)
    assert ".steps.json" in str(result.exception)


def test_a_trace_is_of_one_wiring(tmp_path):
    result = CliRunner().invoke(app, ["decode", "-w", "monolith", "-w", "1A1F", "--trace", str(tmp_path / "t.json")])
    assert isinstance(result.exception, InvalidInput)
    assert "one wiring" in str(result.exception)


@pytest.mark.parametrize("verb", ["transports", "links", "decode", "prefill", "mixed", "trace"])
def test_every_verb_says_what_it_takes(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "--output" in result.output
