"""Strings of documents: a name, an address or a path is one line; the API server's schema says the same as the typed document."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from antiphon.core.document.loading import KINDS, parse_documents, parse_object
from antiphon.core.document.part import LINE_PATTERN
from antiphon.core.document.yaml import path_text
from antiphon.core.errors import SpecInvalid
from antiphon_operator.api.schema import structural_schema

EXAMPLES = sorted((Path(__file__).parents[4] / "deploy/examples").glob("*.yaml"))
FOR_PEOPLE = ("description", "annotations", "env")

COMPOSITION = """\
apiVersion: serving.antiphon.dev/v1alpha1
kind: CompositionOfExperts
metadata: {name: coe, namespace: models}
spec:
  general: small
  categories: [{name: code, description: "Programs,\\nand questions about them.\\n", expert: small}]
  router: {artifact: {uri: ./router}, apiKeysSecret: {name: keys, key: a.key}}
  experts:
    - {name: small, external: {url: "http://127.0.0.1:8000/v1", model: small, apiKeyEnv: KEY}}
    - {name: large, deploymentRef: large}
  rules: [{name: first, expert: large, when: {category: code, header: x-team, value: "a b"}}]
  learning: {log: ./feedback.jsonl}
"""


def _strings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, str) and not set(path) & set(FOR_PEOPLE):
        yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _strings(child, (*path, key))


def _with(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    out = copy.deepcopy(value)
    parent = out
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = text.format(parent[path[-1]])
    return out


def _wrong(value: object) -> set[str]:
    try:
        parse_object(value, "test.yaml")
    except SpecInvalid as error:
        return {problem.path for problem in error.problems}
    return set()


@pytest.mark.parametrize("spoilt", ["{}\n", "{}\u2028", " {}", "{}\u00a0", "a\x07{}", "\ufeff{}", ""], ids=ascii)
@pytest.mark.parametrize("source", [*EXAMPLES, COMPOSITION], ids=lambda source: getattr(source, "name", "composition"))
def test_a_string_with_blanks_at_its_ends_or_controls_is_refused_by_its_field(source: Path | str, spoilt: str) -> None:
    for value in yaml.safe_load_all(source if isinstance(source, str) else source.read_text(encoding="utf-8")):
        parse_object(value, "good")
        for path in _strings(value):
            if not spoilt and path[-1] == "value":
                continue  # a header or a taint may have an empty one
            assert path_text(path) in _wrong(_with(value, path, spoilt))


def _leaves(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if schema.get("type") == "string":
        yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from _leaves(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _leaves(schema[key], path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_server_checks_every_string_by_a_whole_pattern(kind: str) -> None:
    named_by_rules = {"spec.pools.name"}  # a CEL rule says which pools' names are DNS labels
    for path, leaf in _leaves(structural_schema(KINDS[kind])["properties"]["spec"], "spec"):
        if "enum" not in leaf and path not in named_by_rules:
            assert leaf.get("pattern", "").startswith("^"), path
            assert leaf["pattern"].endswith("$"), path
            if not path.endswith((".description", ".env")):
                assert re.compile(leaf["pattern"]).fullmatch("a\n") is None, path


@pytest.mark.parametrize("text", ["a", "/models/my model", "ünïcødé", "模型", "a\u200db", "hf://org/name"])
def test_a_line_is_any_text_on_one_line(text: str) -> None:
    assert re.fullmatch(LINE_PATTERN, text)


def test_a_description_has_as_many_lines_as_it_likes() -> None:
    (document,) = parse_documents(COMPOSITION, "test.yaml")
    assert document.spec.categories[0].description.count("\n") == 2  # type: ignore[attr-defined]


def test_the_message_says_what_a_string_may_not_have() -> None:
    with pytest.raises(SpecInvalid) as caught:
        parse_documents(COMPOSITION.replace("./router", '"./router\\n"'), "test.yaml")
    (problem,) = caught.value.problems
    assert (problem.path, problem.line) == ("spec.router.artifact.uri", 7)
    assert "without blanks at its ends, got the string './router\\n'" in problem.message


@pytest.mark.parametrize("env", [{"A\n": "x"}, {"": "x"}, {"A=B": "x"}, {"A": "\x00"}])
def test_what_no_environment_can_hold_is_refused(env: dict[str, str]) -> None:
    value = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": "a"},
        "spec": {"model": {"uri": "/m"}, "pools": [{"name": "m", "role": "monolith", "env": env}]},
    }
    with pytest.raises(SpecInvalid) as caught:
        parse_object(value, "test.yaml")
    assert caught.value.problems[0].path.startswith("spec.pools[0].env")
