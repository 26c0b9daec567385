"""Which keys the doors of ``antiphon serve`` ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from antiphon.cli.serving.quick_document import API_KEYS_ENV
from antiphon.cli.serving.serve import read_text, with_door

DOCUMENT = """
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata: {name: m}
spec:
  model: {uri: hf://org/name}
  topology: monolith
  pools: [{name: monolith, role: monolith}]
"""


@pytest.mark.parametrize(
    ("named", "in_variable", "given", "asked_for"),
    [
        ("", None, None, None),
        ("", "sk-a", None, API_KEYS_ENV),
        ("", "", None, None),
        ("  endpoint: {apiKeysEnv: OTHER}", "sk-a", None, "OTHER"),
        ("  endpoint: {apiKeysFile: /keys}", "sk-a", None, None),
        ("", "sk-a", "sk-b", API_KEYS_ENV),
        ("  endpoint: {apiKeysEnv: OTHER}", None, "sk-b", "OTHER"),
    ],
)
def test_keys_of_the_variable_are_asked_for_where_a_document_names_none(
    named: str, in_variable: str | None, given: str | None, asked_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ((API_KEYS_ENV, in_variable), ("OTHER", "sk-o")):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    door = with_door(read_text(DOCUMENT + named, str(Path("m.yaml"))), None, given).endpoint
    assert door.api_keys_env == asked_for
    if given is not None and asked_for is not None:
        assert os.environ[asked_for] == given
