"""Every error of the command looks alike: one line on stderr that begins with "error:"."""

from __future__ import annotations

from pathlib import Path

import pytest

from antiphon.cli import main
from antiphon.cli.errors import problem_line
from antiphon.core.errors import Problem

DOCUMENT = """\
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata: {name: demo}
spec:
  model:
    uri: /nowhere
  topology: monolith
  pools:
    - {name: monolith, role: monolith, replicas: 0}
"""


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["antiphon", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stauts",), "no such command 'stauts'; did you mean status? (antiphon --help)"),
        (("serve", "--prot", "8"), "no such option: --prot; did you mean --port? (antiphon serve --help)"),
        (("keys", "nwe"), "no such command 'nwe'"),
        (("init", "--topology", "foo"), "invalid value for '--topology': 'foo' is not one of"),
        (("keys", "hash"), "missing argument"),
        (("--nope",), "no such option"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_is_one_line(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith(f"error: {said}")
    assert "--help)" in line


def test_serve_and_validate_name_the_same_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(DOCUMENT.replace("replicas: 0", "replicas: x"))
    assert called(monkeypatch, "validate", "-f", str(wrong)) == 1
    line = capsys.readouterr().out.strip()
    assert line == f"{wrong}:9: spec.pools[0].replicas: expected an integer, got the string 'x'"
    assert called(monkeypatch, "serve", str(wrong)) == 1
    assert capsys.readouterr().err.strip() == f"error: {line}"


def test_what_only_serving_finds_wrong_has_file_and_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(DOCUMENT)
    assert called(monkeypatch, "serve", str(file)) == 1
    assert capsys.readouterr().err.startswith(f"error: {file}:8: LLMDeployment/demo: spec.pools: nothing can be served")
    file.write_text(DOCUMENT.replace("replicas: 0", "replicas: 1"))
    assert called(monkeypatch, "serve", str(file), "--port", "0", "--grpc-port", "0") == 1
    assert capsys.readouterr().err.startswith(f"error: {file}:6: demo: spec.model.uri: /nowhere: no such directory")


def test_a_problem_without_a_file_is_told_by_its_path() -> None:
    assert problem_line(Problem(path="open files", message="too few")) == "open files: too few"
    assert problem_line(Problem(path="a.yaml", message="can't be read", source="a.yaml")) == "a.yaml: can't be read"
