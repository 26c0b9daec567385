"""A good and a bad document for every CEL rule of the kinds (control speed, data). Shipped.

A pair of a case is (accepted, refused); where a rule compares with the older document, each is a pair (old, new). Must not know:
what evaluates the rules.
"""

from __future__ import annotations

from typing import Any

from antiphon_operator.api.rules import Rule

Document = dict[str, Any]
Case = Document | tuple[Document, Document]


def _llm(topology: str = "pd-afd", **spec: Any) -> dict[str, Any]:
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


def _pools(*items: dict[str, Any], topology: str = "afd", **spec: Any) -> dict[str, Any]:
    return _llm(topology, **{**spec, "pools": list(items)})


def _drafting(**model: Any) -> dict[str, Any]:
    return _llm(speculation={"drafter": "model", "model": model})


_A = {"name": "attention", "role": "attention"}
_F = {"name": "ffn", "role": "ffn"}


def _coe(**spec: Any) -> dict[str, Any]:
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


_VOTE = {"mode": "vote", "experts": ["math", "chat"]}
_CHECK = {"expert": "math", "weight": 1.0, "bias": 2.0}


def _external(**fields: Any) -> dict[str, Any]:
    return _coe(experts=[{"name": "chat", "external": {"url": "https://x/v1", "model": "m", **fields}}])


def _mart(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "weights"},
        "spec": {"uri": "hf://a/b", **spec},
    }


def _spool(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": "demo-ffn"},
        "spec": {"deployment": "demo", "pool": "ffn", "role": "ffn", "mode": "External", "maxReplicas": 4, **spec},
    }


def _named(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {**document, "metadata": {"name": name}}


_GPU = {"resources": {"gpu": 4}, "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 4}}
_SLO = {"scaling": {"mode": "SLO", "minReplicas": 1, "maxReplicas": 4}}
_KEY = {"name": "keys", "key": "chat"}
_RULE = {"name": "r", "when": {"category": "x"}, "expert": "chat"}

# start of the message: accepted, refused, or (old, new) pairs for rules on updates
CASES: dict[str, dict[str, tuple[Case, Case]]] = {
    "LLMDeployment": {
        "metadata.name must have at most": (_named(_llm(), "a" * 40), _named(_llm(), "a" * 41)),
        "model.uri must be hf://": (_llm(model={"uri": "hf://HuggingFaceTB/SmolLM2"}), _llm(model={"uri": "SmolLM"})),
        "scaling mode SLO needs something": (
            _pools({**_A, **_SLO}, _F, slo={"ttftMs": 200}),
            _pools({**_A, **_SLO}, _F, slo={}),
        ),
        "endpoint.httpPort and endpoint.grpcPort must differ": (
            _llm(endpoint={"httpPort": 8001, "grpcPort": 9001}),
            _llm(endpoint={"httpPort": 8265, "grpcPort": 9000}),
        ),
        "metadata.name must be a DNS label": (_named(_llm(), "a-1"), _named(_llm(), "1.a")),
        "topology afd and pd-afd needs a pool with role ffn": (_llm("afd"), _pools(_A)),
        "topology afd and pd-afd needs a pool with role attention": (_llm("afd"), _pools(_F)),
        "topology pd and pd-afd needs a pool with role prefill": (
            _llm("pd"),
            _pools({"name": "d", "role": "decode"}, topology="pd"),
        ),
        "topology pd needs a pool with role decode": (_llm("pd"), _pools({"name": "p", "role": "prefill"}, topology="pd")),
        "topology monolith needs a pool with role monolith": (_llm("monolith"), _pools(_A, topology="monolith")),
        "exactly one of uri and deploymentRef": (_drafting(deploymentRef="small"), _drafting(uri="/s", deploymentRef="small")),
        "speculation.model.uri must be": (_drafting(uri="pvc://disk/s"), _drafting(uri="SmolLM")),
        "revision goes with uri": (_drafting(uri="/s", revision="v1"), _drafting(deploymentRef="small", revision="v1")),
        "speculation.model.deploymentRef names": (_drafting(deploymentRef="small"), _drafting(deploymentRef="demo")),
        "model.numExperts must divide": (
            _pools(_A, {**_F, "replicas": 4, "parallelism": {"expert": 4}}, model={"uri": "/m", "numExperts": 8}),
            _pools(_A, {**_F, "replicas": 4, "parallelism": {"expert": 4}}, model={"uri": "/m", "numExperts": 6}),
        ),
        "all ffn pools must have the same parallelism": (
            _pools(_A, _F, {**_F, "name": "ffn2"}),
            _pools(_A, _F, {**_F, "name": "ffn2", "replicas": 2, "parallelism": {"tensor": 2}}),
        ),
        "ratios must name existing pools": (
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 1}]),
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "prefill", "min": 1}]),
        ),
        "gpuBudget must cover": (
            _pools({**_A, **_GPU}, {**_F, **_GPU}, gpuBudget=20),
            _pools({**_A, **_GPU}, {**_F, **_GPU}, gpuBudget=19),
        ),
        "topology can't be changed": ((_llm("afd"), _llm("afd")), (_llm("afd"), _llm("pd-afd"))),
        "model.name can't be changed": (
            (_llm(model={"uri": "/m", "name": "x"}), _llm(model={"uri": "/n", "name": "x"})),
            (_llm(model={"uri": "/m", "name": "x"}), _llm(model={"uri": "/m"})),
        ),
        "the role of a pool can't be changed": (
            (_pools(_A, _F), _pools(_A, {**_F, "replicas": 3})),
            (_pools(_A, _F), _pools({**_A, "role": "ffn"}, {**_F, "role": "attention"})),
        ),
        "the pool names gateway": (_pools(_A, _F), _pools({**_A, "name": "gateway"}, _F)),
        "parallelism is for ffn pools only": (_pools(_A, _F), _pools({**_A, "replicas": 2, "parallelism": {"tensor": 2}}, _F)),
        "replicas must be a multiple": (
            _pools(_A, {**_F, "replicas": 4, "parallelism": {"tensor": 2}}),
            _pools(_A, {**_F, "replicas": 3, "parallelism": {"tensor": 2}}),
        ),
        "scaling.minReplicas and scaling.maxReplicas must be multiples": (
            _pools(
                _A,
                {
                    **_F,
                    "replicas": 2,
                    "parallelism": {"tensor": 2},
                    "scaling": {"mode": "External", "minReplicas": 2, "maxReplicas": 4},
                },
            ),
            _pools(
                _A,
                {
                    **_F,
                    "replicas": 2,
                    "parallelism": {"tensor": 2},
                    "scaling": {"mode": "External", "minReplicas": 2, "maxReplicas": 5},
                },
            ),
        ),
        "scaling mode External or SLO needs": (
            _pools({**_A, "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 2}}, _F),
            _pools({**_A, "scaling": {"mode": "External", "minReplicas": 1}}, _F),
        ),
        "minReplicas must not be above": (
            _pools({**_A, "scaling": {"minReplicas": 2, "maxReplicas": 2}}, _F),
            _pools({**_A, "scaling": {"minReplicas": 3, "maxReplicas": 2}}, _F),
        ),
        "numerator and denominator must be different": (
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention"}]),
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "ffn"}]),
        ),
        "min must not be above max": (
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 1, "max": 2.5}]),
            _llm("afd", ratios=[{"numerator": "ffn", "denominator": "attention", "min": 3, "max": 2.5}]),
        ),
        "numUbatches must be auto": (_llm(transport={"numUbatches": 3}), _llm(transport={"numUbatches": 9})),
    },
    "ServingPool": {
        "deployment, pool and role": ((_spool(), _spool(replicas=3)), (_spool(), _spool(pool="other"))),
        "minReplicas must not be above": (_spool(minReplicas=4), _spool(minReplicas=5)),
    },
    "CompositionOfExperts": {
        "metadata.name must have at most": (_named(_coe(), "a" * 40), _named(_coe(), "a" * 41)),
        "each expert needs exactly one": (_coe(), _coe(experts=[{"name": "chat"}])),
        "apiKeySecret is for a deploymentRef": (
            _coe(experts=[{"name": "chat", "deploymentRef": "chat", "apiKeySecret": _KEY}]),
            _coe(experts=[{"name": "chat", "external": {"url": "https://x/v1", "model": "m"}, "apiKeySecret": _KEY}]),
        ),
        "give apiKeyEnv or apiKeySecret": (
            _external(apiKeyEnv="KEY"),
            _external(apiKeyEnv="KEY", apiKeySecret={"name": "s", "key": "k"}),
        ),
        "external.url must start": (_external(), _external(url="ftp://x/v1")),
        "general must name": (_coe(), _coe(general="law")),
        "categories must map": (
            _coe(categories=[{"name": "c", "expert": "math"}]),
            _coe(categories=[{"name": "c", "expert": "law"}]),
        ),
        "rules must name": (_coe(rules=[_RULE]), _coe(rules=[{**_RULE, "expert": "law"}])),
        "combine must name": (_coe(combine=_VOTE), _coe(combine={**_VOTE, "experts": ["math", "law"]})),
        "combine asks each": (_coe(combine=_VOTE), _coe(combine={**_VOTE, "experts": ["math", "math"]})),
        "minVotes must not": (_coe(combine=_VOTE), _coe(combine={**_VOTE, "minVotes": 3})),
        "a cascade needs a check": (
            _coe(combine={**_VOTE, "mode": "cascade", "checks": [_CHECK]}),
            _coe(combine={**_VOTE, "mode": "cascade", "checks": [_CHECK], "otherwise": "decline"}),
        ),
        "fallbacks must name": (_coe(fallbacks=["math"]), _coe(fallbacks=["law"])),
        "policy budget needs": (_coe(policy={"name": "budget", "maxAvgCost": 1}), _coe(policy={"name": "budget"})),
        "policy at-least needs": (_coe(policy={"name": "at-least", "atLeast": 0.95}), _coe(policy={"name": "at-least"})),
        "give maxAvgActiveParamsB": (_coe(policy={"maxAvgCost": 1}), _coe(policy={"maxAvgCost": 1, "maxAvgActiveParamsB": 1})),
        "a rule needs at least one": (_coe(rules=[_RULE]), _coe(rules=[{**_RULE, "when": {}}])),
        "value needs a header": (
            _coe(rules=[{**_RULE, "when": {"header": "x-a", "value": "1"}}]),
            _coe(rules=[{**_RULE, "when": {"category": "c", "value": "1"}}]),
        ),
    },
    "ModelArtifact": {
        "metadata.name must have at most": (_named(_mart(), "a" * 40), _named(_mart(), "a" * 41)),
        "uri and revision can't be changed": ((_mart(), _mart(retries=1)), (_mart(), _mart(uri="hf://a/c"))),
        "a pvc:// uri is used in place": (_mart(uri="pvc://c/p"), _mart(uri="pvc://c/p", storage={"claimName": "x"})),
    },
}


def case_of(kind: str, rule: Rule) -> tuple[Case, Case]:
    """The case of ``rule``.

    Raises:
        ValueError: there is none, or more than one.
    """
    (found,) = [case for start, case in CASES[kind].items() if rule.message.startswith(start)]
    return found
