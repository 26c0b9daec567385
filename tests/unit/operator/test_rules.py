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


def llm(topology: str = "pd-afd", **spec: Any) -> dict[str, Any]:
    roles = {
        "pd-afd": ("prefill", "attention", "ffn"),
        "afd": ("attention", "ffn"),
        "pd": ("prefill", "decode"),
        "monolith": ("monolith",),
    }
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"uri": "/m"},
            "topology": topology,
            "pools": [{"name": role, "role": role} for role in roles[topology]],
            **spec,
        },
    }


def pools(*items: dict[str, Any], topology: str = "afd", **spec: Any) -> dict[str, Any]:
    return llm(topology, **{**spec, "pools": list(items)})


A = {"name": "attention", "role": "attention"}
F = {"name": "ffn", "role": "ffn"}


def coe(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "team"},
        "spec": {
            "experts": [{"name": "math", "deploymentRef": "math"}, {"name": "chat", "deploymentRef": "chat"}],
            "general": "chat",
            **spec,
        },
    }


def external(**fields: Any) -> dict[str, Any]:
    return coe(experts=[{"name": "chat", "external": {"url": "https://x/v1", "model": "m", **fields}}])


def mart(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "weights"},
        "spec": {"uri": "hf://a/b", **spec},
    }


def spool(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": "demo-ffn"},
        "spec": {"deployment": "demo", "pool": "ffn", "role": "ffn", "mode": "External", "maxReplicas": 4, **spec},
    }


def named(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {**document, "metadata": {"name": name}}


GPU = {"resources": {"gpu": 4}, "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 4}}
RULE = {"name": "r", "when": {"category": "x"}, "expert": "chat"}

# start of the message: accepted, refused, or (old, new) pairs for rules on updates
CASES: dict[str, dict[str, tuple[Any, Any]]] = {
    "LLMDeployment": {
        "metadata.name must have at most": (named(llm(), "a" * 40), named(llm(), "a" * 41)),
        "metadata.name must be a DNS label": (named(llm(), "a-1"), named(llm(), "1.a")),
        "topology afd and pd-afd needs a pool with role ffn": (llm("afd"), pools(A)),
        "topology afd and pd-afd needs a pool with role attention": (llm("afd"), pools(F)),
        "topology pd and pd-afd needs a pool with role prefill": (llm("pd"), pools({"name": "d", "role": "decode"}, topology="pd")),
        "topology pd needs a pool with role decode": (llm("pd"), pools({"name": "p", "role": "prefill"}, topology="pd")),
        "topology monolith needs a pool with role monolith": (llm("monolith"), pools(A, topology="monolith")),
        "model.numExperts must divide": (
            pools(A, {**F, "replicas": 4, "parallelism": {"expert": 4}}, model={"uri": "/m", "numExperts": 8}),
            pools(A, {**F, "replicas": 4, "parallelism": {"expert": 4}}, model={"uri": "/m", "numExperts": 6}),
        ),
        "all ffn pools must have the same parallelism": (
            pools(A, F, {**F, "name": "ffn2"}),
            pools(A, F, {**F, "name": "ffn2", "replicas": 2, "parallelism": {"tensor": 2}}),
        ),
        "ratios must name existing pools": (
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 1}]),
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "prefill", "min": 1}]),
        ),
        "gpuBudget must cover": (pools({**A, **GPU}, {**F, **GPU}, gpuBudget=20), pools({**A, **GPU}, {**F, **GPU}, gpuBudget=19)),
        "topology can't be changed": ((llm("afd"), llm("afd")), (llm("afd"), llm("pd-afd"))),
        "model.name can't be changed": (
            (llm(model={"uri": "/m", "name": "x"}), llm(model={"uri": "/n", "name": "x"})),
            (llm(model={"uri": "/m", "name": "x"}), llm(model={"uri": "/m"})),
        ),
        "the role of a pool can't be changed": (
            (pools(A, F), pools(A, {**F, "replicas": 3})),
            (pools(A, F), pools({**A, "role": "ffn"}, {**F, "role": "attention"})),
        ),
        "the pool names gateway": (pools(A, F), pools({**A, "name": "gateway"}, F)),
        "parallelism is for ffn pools only": (pools(A, F), pools({**A, "replicas": 2, "parallelism": {"tensor": 2}}, F)),
        "replicas must be a multiple": (
            pools(A, {**F, "replicas": 4, "parallelism": {"tensor": 2}}),
            pools(A, {**F, "replicas": 3, "parallelism": {"tensor": 2}}),
        ),
        "scaling.minReplicas and scaling.maxReplicas must be multiples": (
            pools(
                A,
                {**F, "replicas": 2, "parallelism": {"tensor": 2}, "scaling": {"mode": "SLO", "minReplicas": 2, "maxReplicas": 4}},
            ),
            pools(
                A,
                {**F, "replicas": 2, "parallelism": {"tensor": 2}, "scaling": {"mode": "SLO", "minReplicas": 2, "maxReplicas": 5}},
            ),
        ),
        "scaling mode External or SLO needs": (
            pools({**A, "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 2}}, F),
            pools({**A, "scaling": {"mode": "External", "minReplicas": 1}}, F),
        ),
        "minReplicas must not be above": (
            pools({**A, "scaling": {"minReplicas": 2, "maxReplicas": 2}}, F),
            pools({**A, "scaling": {"minReplicas": 3, "maxReplicas": 2}}, F),
        ),
        "numerator and denominator must be different": (
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention"}]),
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "ffn"}]),
        ),
        "min must not be above max": (
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 1, "max": 2.5}]),
            llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 3, "max": 2.5}]),
        ),
        "numUbatches must be auto": (llm(transport={"numUbatches": 3}), llm(transport={"numUbatches": 9})),
    },
    "ServingPool": {
        "deployment, pool and role": ((spool(), spool(replicas=3)), (spool(), spool(pool="other"))),
        "minReplicas must not be above": (spool(minReplicas=4), spool(minReplicas=5)),
    },
    "CompositionOfExperts": {
        "metadata.name must have at most": (named(coe(), "a" * 40), named(coe(), "a" * 41)),
        "each expert needs exactly one": (coe(), coe(experts=[{"name": "chat"}])),
        "give apiKeyEnv or apiKeySecret": (
            external(apiKeyEnv="KEY"),
            external(apiKeyEnv="KEY", apiKeySecret={"name": "s", "key": "k"}),
        ),
        "external.url must start": (external(), external(url="ftp://x/v1")),
        "general must name": (coe(), coe(general="law")),
        "categories must map": (
            coe(categories=[{"name": "c", "expert": "math"}]),
            coe(categories=[{"name": "c", "expert": "law"}]),
        ),
        "rules must name": (coe(rules=[RULE]), coe(rules=[{**RULE, "expert": "law"}])),
        "fallbacks must name": (coe(fallbacks=["math"]), coe(fallbacks=["law"])),
        "policy budget needs": (coe(policy={"name": "budget", "maxAvgCost": 1}), coe(policy={"name": "budget"})),
        "give maxAvgActiveParamsB": (coe(policy={"maxAvgCost": 1}), coe(policy={"maxAvgCost": 1, "maxAvgActiveParamsB": 1})),
        "a rule needs at least one": (coe(rules=[RULE]), coe(rules=[{**RULE, "when": {}}])),
        "value needs a header": (
            coe(rules=[{**RULE, "when": {"header": "x-a", "value": "1"}}]),
            coe(rules=[{**RULE, "when": {"category": "c", "value": "1"}}]),
        ),
    },
    "ModelArtifact": {
        "metadata.name must have at most": (named(mart(), "a" * 40), named(mart(), "a" * 41)),
        "uri and revision can't be changed": ((mart(), mart(retries=1)), (mart(), mart(uri="hf://a/c"))),
        "a pvc:// uri is used in place": (mart(uri="pvc://c/p"), mart(uri="pvc://c/p", storage={"claimName": "x"})),
    },
}
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


def case_of(kind: str, rule: Rule) -> tuple[Any, Any]:
    (found,) = [case for start, case in CASES[kind].items() if rule.message.startswith(start)]
    return found


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_a_rule_accepts_its_good_document(kind: str, rule: Rule) -> None:
    assert holds(kind, rule, case_of(kind, rule)[0])


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_a_rule_refuses_its_bad_document(kind: str, rule: Rule) -> None:
    assert not holds(kind, rule, case_of(kind, rule)[1])


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_the_typed_document_agrees_with_the_rule(kind: str, rule: Rule) -> None:
    good, bad = case_of(kind, rule)
    document = DEFINITIONS[kind].document
    if isinstance(good, tuple):
        document.model_validate(good[1])
        return  # a laptop has no older version to compare with
    document.model_validate(good)
    if kind in ("CompositionOfExperts", "ModelArtifact", "LLMDeployment"):
        with pytest.raises(ValidationError):
            document.model_validate(bad)
