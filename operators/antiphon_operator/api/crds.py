"""Generates the CustomResourceDefinitions of the kinds from their typed documents (control speed, pure).

Must not know: the API server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel

from antiphon.core.document.artifact import ModelArtifact
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.pools import ServingPool
from antiphon.core.document.spec import GROUP, VERSION, LLMDeployment
from antiphon_operator.api import status
from antiphon_operator.api.rules import ARTIFACT_RULES, COMPOSITION_RULES, LLM_RULES, POOL_RULES, Rule
from antiphon_operator.api.schema import Json, structural_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of ``kubectl get``; ``wide`` ones appear with -o wide."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindDefinition:
    """Everything that the API server is told about a kind."""

    document: type[BaseModel]
    status: type[BaseModel]
    plural: str
    short_names: tuple[str, ...]
    columns: tuple[Column, ...]
    rules: tuple[Rule, ...]
    scale: bool = False
    map_lists: dict[str, str] = field(default_factory=dict)  # schema path of a list -> its key

    @property
    def kind(self) -> str:
        """The kind's name."""
        return self.document.__name__


def _condition(type_: str, part: str) -> str:
    return f'.status.conditions[?(@.type=="{type_}")].{part}'


_AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date", description="Time since it was created.")
_READY = Column(name="Ready", path=_condition("Ready", "status"), description="Whether it serves.")
_REASON = Column(name="Reason", path=_condition("Ready", "reason"), description="Why.")
_MAP_CONDITIONS = {"status.conditions": "type"}

KINDS: tuple[KindDefinition, ...] = (
    KindDefinition(
        document=LLMDeployment,
        status=status.LLMDeploymentStatus,
        plural="llmdeployments",
        short_names=("llm",),
        rules=LLM_RULES,
        map_lists={"spec.pools": "name", "status.pools": "name", **_MAP_CONDITIONS},
        columns=(
            _READY,
            _REASON,
            Column(name="Model", path=".status.model", description="Name that clients send."),
            Column(name="Topology", path=".spec.topology", description="How the model is split."),
            Column(name="Pools", path=".status.summary", description="Ready and aimed-at workers per pool."),
            Column(name="URL", path=".status.url", description="HTTP API within the cluster."),
            Column(name="Revision", path=".status.revision", wide=True, description="Applied revision."),
            Column(name="Message", path=_condition("Ready", "message"), wide=True, description="Why, in a sentence."),
            _AGE,
        ),
    ),
    KindDefinition(
        document=ServingPool,
        status=status.ServingPoolStatus,
        plural="servingpools",
        short_names=("spool",),
        rules=POOL_RULES,
        scale=True,
        map_lists=_MAP_CONDITIONS,
        columns=(
            Column(name="Role", path=".spec.role", description="What its workers do."),
            Column(name="Mode", path=".spec.mode", description="Who decides the size."),
            Column(name="Desired", path=".status.desiredReplicas", type="integer", description="Wanted before limits."),
            Column(name="Accepted", path=".status.acceptedReplicas", type="integer", description="Aimed at."),
            Column(name="Ready", path=".status.readyReplicas", type="integer", description="Ready."),
            Column(name="Limited", path=_condition("ScalingLimited", "reason"), description="What limits it."),
            _AGE,
        ),
    ),
    KindDefinition(
        document=CompositionOfExperts,
        status=status.CompositionStatus,
        plural="compositionsofexperts",
        short_names=("coe",),
        rules=COMPOSITION_RULES,
        map_lists={"spec.experts": "name", "spec.rules": "name", "spec.categories": "name", **_MAP_CONDITIONS},
        columns=(
            _READY,
            _REASON,
            Column(name="Experts", path=".status.expertsReady", description="Ready of all experts."),
            Column(name="Pool", path=".status.modelPool", wide=True, description="Experts that share memory."),
            Column(name="Policy", path=".spec.policy.name", description="What is weighed against quality."),
            Column(name="URL", path=".status.url", description="HTTP API within the cluster."),
            _AGE,
        ),
    ),
    KindDefinition(
        document=ModelArtifact,
        status=status.ModelArtifactStatus,
        plural="modelartifacts",
        short_names=("mart",),
        rules=ARTIFACT_RULES,
        map_lists=_MAP_CONDITIONS,
        columns=(
            _READY,
            _REASON,
            Column(name="URI", path=".spec.uri", description="Source of the weights."),
            Column(name="Claim", path=".status.claimName", description="Where they are kept."),
            Column(name="Digest", path=".status.digest", wide=True, description="What they hash to."),
            _AGE,
        ),
    ),
)


def definition(kind: KindDefinition) -> Json:
    """The CustomResourceDefinition of ``kind``."""
    document = structural_schema(kind.document)
    root: Json = {
        "type": "object",
        "description": (kind.document.__doc__ or "").strip().partition("\n")[0],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Group and version of the kind."},
            "kind": {"type": "string", "description": "The kind."},
            "metadata": {"type": "object"},
            "spec": document["properties"]["spec"],
            "status": structural_schema(kind.status),
        },
    }
    root["properties"]["spec"].pop("default", None)
    root["properties"]["status"]["description"] = "What is known about it; written by the operator."
    for path, key in kind.map_lists.items():
        _at(root, path).update({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]})
    for rule in kind.rules:
        node = _at(root, rule.path)
        node.setdefault("x-kubernetes-validations", []).append({"rule": rule.rule, "message": rule.message})
    version: Json = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_column(column) for column in kind.columns],
    }
    if kind.scale:
        version["subresources"]["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "antiphon"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": list(kind.short_names),
                "categories": ["all", "antiphon"],
            },
            "versions": [version],
        },
    }


def definitions() -> tuple[Json, ...]:
    """The CustomResourceDefinitions of all kinds."""
    return tuple(definition(kind) for kind in KINDS)


def _column(column: Column) -> Json:
    out: Json = {"name": column.name, "type": column.type, "jsonPath": column.path}
    if column.description:
        out["description"] = column.description
    if column.wide:
        out["priority"] = 1
    return out


def _at(root: Json, path: str) -> Json:
    node = root
    for part in path.split(".") if path else ():
        node = node["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            node = node["items"]
    return node
