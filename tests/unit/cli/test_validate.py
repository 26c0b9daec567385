"""``antiphon validate``: its lines, its JSON and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.cli.validate import app

GOOD = """\
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata: {name: demo}
spec:
  model: {uri: /models/demo}
  topology: afd
  pools:
    - {name: att, role: attention, replicas: 2}
    - {name: ffn, role: ffn}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace("replicas: 2", "replicas: two").replace("topology", "topolgy"))
    return path


def test_a_good_document_is_described_in_a_line(good: Path) -> None:
    result = CliRunner().invoke(app, ["-f", str(good)])
    assert result.exit_code == 0
    assert result.output == "ok: LLMDeployment/demo (topology afd, pools att attention x2, ffn ffn x1)\n"


def test_each_problem_is_a_line_with_file_line_and_path(bad: Path) -> None:
    result = CliRunner().invoke(app, ["-f", str(bad)])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"{bad}:6: spec.topolgy: unknown key; did you mean topology?",
        f"{bad}:8: spec.pools[0].replicas: expected an integer, got the string 'two'",
    ]


def test_several_files_are_checked_together(good: Path, bad: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    result = CliRunner().invoke(app, ["-f", str(good), "-f", str(bad), "-f", str(missing)])
    assert result.exit_code == 1
    assert "ok: LLMDeployment/demo" in result.output
    assert f"{missing}: can't be read: No such file or directory\n" in result.output
    assert len(result.output.splitlines()) == 4


def test_json_holds_the_same(good: Path, bad: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["--json", "-f", str(good)]).output)
    assert found == {"ok": True, "documents": [{"kind": "LLMDeployment", "name": "demo"}], "problems": []}
    result = CliRunner().invoke(app, ["--json", "-f", str(bad)])
    problems = json.loads(result.output)["problems"]
    assert result.exit_code == 1
    assert problems[1] == {
        "path": "spec.pools[0].replicas",
        "message": "expected an integer, got the string 'two'",
        "source": str(bad),
        "line": 8,
    }


def test_a_file_must_be_named() -> None:
    assert CliRunner().invoke(app, []).exit_code == 2


COMPOSITION = """\
apiVersion: serving.antiphon.dev/v1alpha1
kind: CompositionOfExperts
metadata: {name: team}
spec:
  general: chat
  experts: [{name: chat, deploymentRef: REF}]
  policy: {name: quality}
  router: {artifact: {uri: /routers/team}}
"""


def test_an_expert_whose_deployment_is_in_no_file_of_the_call_is_a_problem(good: Path, tmp_path: Path) -> None:
    team = tmp_path / "team.yaml"
    team.write_text(COMPOSITION.replace("REF", "dmo"))
    result = CliRunner().invoke(app, ["-f", str(team), "-f", str(good)])
    assert result.exit_code == 1
    assert result.output.startswith(
        f"{team}:6: CompositionOfExperts/team: spec.experts[0].deploymentRef: there is no LLMDeployment 'dmo'"
    )
    team.write_text(COMPOSITION.replace("REF", "demo"))
    assert CliRunner().invoke(app, ["-f", str(team), "-f", str(good)]).exit_code == 0


def test_a_composition_alone_may_name_deployments_that_are_elsewhere(tmp_path: Path) -> None:
    team = tmp_path / "team.yaml"
    team.write_text(COMPOSITION.replace("REF", "anywhere"))
    assert CliRunner().invoke(app, ["-f", str(team)]).exit_code == 0


def test_a_draft_model_is_looked_up_among_several_deployments_and_never_in_itself(good: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    drafting = "spec:\n  speculation: {drafter: model, model: {deploymentRef: REF}}\n"
    text = GOOD.replace("name: demo", "name: large").replace("spec:\n", drafting)
    large.write_text(text.replace("REF", "dmo"))
    assert CliRunner().invoke(app, ["-f", str(large)]).exit_code == 0, "it may be elsewhere"
    result = CliRunner().invoke(app, ["-f", str(large), "-f", str(good)])
    assert result.exit_code == 1
    said = "LLMDeployment/large: spec.speculation.model.deploymentRef: there is no LLMDeployment 'dmo' in the files"
    assert result.output.startswith(f"{large}:5: {said}")
    large.write_text(text.replace("REF", "demo"))
    assert CliRunner().invoke(app, ["-f", str(large), "-f", str(good)]).exit_code == 0
    large.write_text(text.replace("REF", "large"))
    result = CliRunner().invoke(app, ["-f", str(large)])
    assert result.exit_code == 1
    assert "drafts for itself" in result.output


def test_an_expert_that_cannot_share_memory_is_named(good: Path) -> None:
    composition = """\
---
apiVersion: serving.antiphon.dev/v1alpha1
kind: CompositionOfExperts
metadata: {name: team}
spec:
  experts: [{name: one, deploymentRef: demo}]
  general: one
  tiers: {residentMemory: 1Gi}
"""
    good.write_text(GOOD + composition)
    result = CliRunner().invoke(app, ["-f", str(good)])
    assert result.exit_code == 1
    assert "spec.experts[0].deploymentRef: an expert of spec.tiers is one monolith" in result.output
