"""The kinds as the chart has them: generated, structural, described, small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from antiphon_operator.api.crds import definitions
from antiphon_operator.api.schema import apply_defaults
from antiphon_operator.cli import render_crds

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/antiphon-crds/files/crds.yaml"
ALL = [pytest.param(d, id=d["spec"]["names"]["kind"]) for d in definitions()]


def schema_of(definition: dict[str, Any]) -> dict[str, Any]:
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def test_the_chart_has_what_the_operator_prints() -> None:
    assert CHART.read_text(encoding="utf-8") == render_crds(definitions()), (
        "run: antiphon-operator crds > helm/antiphon-crds/files/crds.yaml"
    )


@pytest.mark.parametrize("definition", ALL)
def test_every_field_is_described(definition: dict[str, Any]) -> None:
    bare = [
        p for p, node in nodes(schema_of(definition)) if not p.endswith("[]") and p != ".metadata" and not node.get("description")
    ]
    assert bare == []


@pytest.mark.parametrize("definition", ALL)
def test_a_schema_is_structural(definition: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(definition)):
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "oneOf", "allOf", "const", "title", "prefixItems"} & node.keys(), path
        assert not ("properties" in node and "additionalProperties" in node), path
        if "exclusiveMinimum" in node:
            assert node["exclusiveMinimum"] is True, path


@pytest.mark.parametrize("definition", ALL)
def test_every_default_is_valid_as_it_stands(definition: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(definition)):
        if "default" in node:
            plain = {k: v for k, v in node.items() if k != "exclusiveMinimum"}
            if node.get("x-kubernetes-int-or-string") or node["type"] == "object":
                assert set(node["default"]) <= set(node["properties"]) if node.get("type") == "object" else True, path
            else:
                jsonschema.Draft4Validator(plain).validate(node["default"])


@pytest.mark.parametrize("definition", ALL)
def test_a_definition_is_under_250_kb(definition: dict[str, Any]) -> None:
    assert len(yaml.safe_dump(definition).encode()) < 250_000


@pytest.mark.parametrize("definition", ALL)
def test_lists_under_rules_are_bounded(definition: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(definition)["properties"]["spec"]):
        if node.get("type") == "array":
            assert "maxItems" in node, path


@pytest.mark.parametrize("definition", ALL)
def test_columns_lead_to_fields_that_exist(definition: dict[str, Any]) -> None:
    schema = schema_of(definition)
    for column in definition["spec"]["versions"][0]["additionalPrinterColumns"]:
        path = column["jsonPath"]
        if path.startswith((".metadata", ".status.conditions[")):
            continue
        node = schema
        for part in path.strip(".").split("."):
            assert part in node["properties"], path
            node = node["properties"][part]


def test_a_deployment_tells_its_story_in_a_line() -> None:
    (llm,) = [d for d in definitions() if d["spec"]["names"]["kind"] == "LLMDeployment"]
    names = [c["name"] for c in llm["spec"]["versions"][0]["additionalPrinterColumns"] if not c.get("priority")]
    assert names == ["Ready", "Reason", "Model", "Topology", "Pools", "URL", "Age"]


EXAMPLES = sorted((ROOT / "deploy/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_fits_its_kind_and_its_document(path: Path) -> None:
    kinds = {d["spec"]["names"]["kind"]: d for d in definitions()}
    from antiphon_operator.api.crds import KINDS

    documents = {k.kind: k.document for k in KINDS}
    for value in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if value is None or value.get("kind") not in kinds:
            continue
        documents[value["kind"]].model_validate(value)
        filled = apply_defaults(schema_of(kinds[value["kind"]]), value)
        unknown = [key for key in filled["spec"] if key not in schema_of(kinds[value["kind"]])["properties"]["spec"]["properties"]]
        assert unknown == []


def test_the_composition_example_brings_every_deployment_it_refers_to() -> None:
    values = list(yaml.safe_load_all((ROOT / "deploy/examples/experts.yaml").read_text(encoding="utf-8")))
    (composition,) = [value for value in values if value["kind"] == "CompositionOfExperts"]
    references = {expert["deploymentRef"] for expert in composition["spec"]["experts"]}
    assert references == {value["metadata"]["name"] for value in values if value["kind"] == "LLMDeployment"}
