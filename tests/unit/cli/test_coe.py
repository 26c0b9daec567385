import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.cli.coe import app

RUN = CliRunner()


def _run(*arguments: object) -> str:
    result = RUN.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    _run("example-table", "-o", directory / "table.jsonl.gz")
    _run("train", "--table", directory / "table.jsonl.gz", "-o", directory / "artifact", "--embedder", "lsa", "--seed", 3)
    return directory / "artifact"


def test_route_says_expert_category_and_reason(artifact: Path) -> None:
    value = json.loads(_run("route", "--artifact", artifact, "--json", "add the numbers 31 and 12 (case 1-7)"))
    assert (value["expert"], value["category"], value["reason"]) == ("model-1", "sums", "score")
    assert value["artifact"].startswith("sha256:")
    assert _run("route", "--artifact", artifact, "add 3 and 4").count("model-") >= 1


def test_evaluate_judges_unseen_rows_and_keeps_promises(artifact: Path, tmp_path: Path) -> None:
    _run("example-table", "-o", tmp_path / "other.jsonl.gz", "--seed", 8)
    value = json.loads(_run("evaluate", "--artifact", artifact, "--table", tmp_path / "other.jsonl.gz", "--json"))
    assert value["artifact"]["num_rows"] == 360
    assert value["artifact"]["router"] > value["artifact"]["general"]
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"artifact.router": {"min": 0.999}}))
    broken = RUN.invoke(
        app, ["evaluate", "--artifact", str(artifact), "--table", str(tmp_path / "other.jsonl.gz"), "--gate", str(gate)]
    )
    assert broken.exit_code == 1
    assert "broken: artifact.router is" in broken.output


def test_evaluate_of_rows_that_are_all_known_says_so(artifact: Path) -> None:
    result = RUN.invoke(
        app, ["evaluate", "--artifact", str(artifact), "--table", str(artifact.parent / "table.jsonl.gz"), "--no-cross-validation"]
    )
    assert result.exit_code == 0
    assert "no row with every score is new to the artifact" in result.output


def test_evaluate_compares_with_simple_routers_on_unseen_rows_and_has_a_line_per_dataset(artifact: Path, tmp_path: Path) -> None:
    _run("example-table", "-o", tmp_path / "other.jsonl.gz", "--seed", 8)
    asked = (
        "evaluate",
        "--artifact",
        artifact,
        "--table",
        tmp_path / "other.jsonl.gz",
        "--learnt",
        artifact.parent / "table.jsonl.gz",
    )
    value = json.loads(_run(*asked, "--json"))["artifact"]
    assert set(value["over"]) == {"simple", "kNN-100", "ridge"}
    assert value["over"]["simple"]["low"] > -0.05
    shown = _run(*asked)
    assert "over simple" in shown
    assert all(f"dataset {name}" in shown for name in value["by_dataset"])


def test_evaluate_needs_something_to_judge(artifact: Path) -> None:
    result = RUN.invoke(app, ["evaluate", "--table", str(artifact.parent / "table.jsonl.gz"), "--no-cross-validation"])
    assert result.exit_code != 0
