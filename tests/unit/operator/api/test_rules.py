"""Each CEL rule takes a good document and refuses a bad one; the typed document agrees."""

from __future__ import annotations

import copy
from typing import Any

import celpy
import celpy.celtypes as ct
import pytest
from pydantic import ValidationError

from antiphon_operator.api.crds import KINDS, definition
from antiphon_operator.api.rules import Rule
from antiphon_operator.api.schema import apply_defaults
from antiphon_operator.reconcile.llm.accept import Refused, accept
from antiphon_operator.render.settings import Runtime
from antiphon_operator.testing.rule_cases import case_of

DEFINITIONS = {kind.kind: kind for kind in KINDS}


def nodes(schema: dict[str, Any], path: str, value: Any, old: Any) -> list[tuple[Any, Any]]:
    """Pairs (self, oldSelf or None) that a rule at ``path`` is checked on; list items pair by their map key."""
    found = [(value, old)]
    for part in path.split(".") if path else ():
        name, is_list = part.removesuffix("[]"), part.endswith("[]")
        schema = schema["properties"][name]
        found = [(v[name], (o or {}).get(name)) for v, o in found if name in v]
        if is_list:
            key = (schema.get("x-kubernetes-list-map-keys") or [None])[0]
            found = [
                (item, next((x for x in o or () if key is not None and x[key] == item[key]), None)) for v, o in found for item in v
            ]
            schema = schema["items"]
    return found


def numbers(schema: dict[str, Any], value: Any) -> Any:
    """The value as the API server types it for CEL: fields of type number are doubles."""
    if schema.get("type") == "number":
        return float(value)
    if isinstance(value, dict) and "properties" in schema:
        return {name: numbers(schema["properties"].get(name, {}), item) for name, item in value.items()}
    if isinstance(value, list):
        return [numbers(schema.get("items", {}), item) for item in value]
    return value


def total(values: ct.ListType) -> ct.IntType:
    result = ct.IntType(0)
    for value in values:
        result = result + value
    return result


def holds(kind: str, rule: Rule, case: Any) -> bool:
    schema = definition(DEFINITIONS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    old, new = case if isinstance(case, tuple) else (None, case)
    old, new = (numbers(schema, apply_defaults(schema, copy.deepcopy(d))) if d is not None else None for d in (old, new))
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule.rule), functions={"sum": total})
    verdicts = []
    for value, before in nodes(schema, rule.path, new, old):
        if "oldSelf" in rule.rule and before is None:
            continue
        activation = {"self": celpy.json_to_cel(value)}
        if before is not None:
            activation["oldSelf"] = celpy.json_to_cel(before)
        verdicts.append(bool(program.evaluate(activation)))
    assert verdicts, "the rule was checked on nothing"
    return all(verdicts)


ALL_RULES = [pytest.param(kind.kind, rule, id=f"{kind.kind}-{rule.message[:40]}") for kind in KINDS for rule in kind.rules]


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_a_rule_accepts_its_good_document(kind: str, rule: Rule) -> None:
    assert holds(kind, rule, case_of(kind, rule)[0])


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_a_rule_refuses_its_bad_document(kind: str, rule: Rule) -> None:
    assert not holds(kind, rule, case_of(kind, rule)[1])


# A laptop takes relative paths, and its ports are not shared with Ray's.
CLUSTER_ONLY = ("model.uri must be", "speculation.model.uri must be", "endpoint.httpPort and endpoint.grpcPort")


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_the_typed_document_agrees_with_the_rule(kind: str, rule: Rule) -> None:
    good, bad = case_of(kind, rule)
    document = DEFINITIONS[kind].document
    if isinstance(good, tuple):
        document.model_validate(good[1])
        return  # a laptop has no older version to compare with
    document.model_validate(good)
    if rule.message.startswith(CLUSTER_ONLY):
        with pytest.raises(Refused):
            accept(bad, Runtime(image="w", ray_version="2.60.0"))
    elif kind in ("CompositionOfExperts", "ModelArtifact", "LLMDeployment"):
        with pytest.raises(ValidationError):
            document.model_validate(bad)
