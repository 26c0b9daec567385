"""Finds the claim that holds a document's weights (control speed, pure).

A ModelArtifact of the same uri and revision in the same namespace is used; without one, pvc:// is mounted and anything else is
left to the workers. Must not know: how weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import Reason
from antiphon_operator.kube.base import Object, name_of
from antiphon_operator.planning.memory import NOTHING_KNOWN, WeightSizes
from antiphon_operator.reconcile.llm.status import ModelState
from antiphon_operator.render.settings import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where the weights are, and whether they are."""

    weights: Weights | None
    model: ModelState
    sizes: WeightSizes = NOTHING_KNOWN


def uses(document: LLMDeployment, artifact: Object) -> bool:
    """True when ``document`` is served from ``artifact``."""
    spec, model = artifact["spec"], document.spec.model
    return bool(spec["uri"] == model.uri and spec.get("revision") == model.revision)


def place_of(artifact: Object) -> Weights:
    """Where the weights of ``artifact`` are or will be; it follows from its document alone."""
    uri = str(artifact["spec"]["uri"])
    if uri.startswith("pvc://"):
        return _in_place(uri)
    claim = artifact["spec"].get("storage", {}).get("claimName") or name_of(artifact)
    return Weights(claim=claim, path=f"artifacts/{name_of(artifact)}")


def _in_place(uri: str) -> Weights:
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return Weights(claim=claim, path=path.strip("/"))


def find_weights(document: LLMDeployment, artifacts: Iterable[Object]) -> Found:
    """The weights of ``document`` among ``artifacts``."""
    for artifact in artifacts:
        if uses(document, artifact) and "deletionTimestamp" not in artifact["metadata"]:
            return _of_artifact(artifact)
    if document.spec.model.uri.startswith("pvc://"):
        weights = _in_place(document.spec.model.uri)
        cached = ModelState(ready=True, reason=Reason.CACHED, message=f"claim {weights.claim}")
        return Found(weights=weights, model=cached)
    direct = ModelState(ready=True, reason=Reason.DIRECT, message="workers fetch the weights themselves")
    return Found(weights=None, model=direct)


def model_of_refused(live: Object, artifacts: Iterable[Object]) -> ModelState | None:
    """Where the weights stand that ``live`` names, though nothing is done for it; None when no artifact speaks of them."""
    model = live["spec"].get("model", {})
    for artifact in artifacts:
        same = (artifact["spec"]["uri"], artifact["spec"].get("revision")) == (model.get("uri"), model.get("revision"))
        if same and "deletionTimestamp" not in artifact["metadata"]:
            return _of_artifact(artifact).model
    return None


def _of_artifact(artifact: Object) -> Found:
    status, name = artifact.get("status", {}), name_of(artifact)
    weights = place_of(artifact)
    match status.get("phase"):
        case "Cached":
            state = ModelState(ready=True, reason=Reason.CACHED, message=f"ModelArtifact {name}")
        case "Failed":
            state = ModelState(ready=False, reason=Reason.DOWNLOAD_FAILED, message=f"ModelArtifact {name}: {_why(status)}")
        case _:
            state = ModelState(ready=False, reason=Reason.DOWNLOADING, message=f"ModelArtifact {name}: {_why(status)}")
    size_bytes = int(status.get("sizeBytes", 0))
    sizes = WeightSizes(
        total_bytes=size_bytes or None,
        ffn_bytes=int(status.get("ffnBytes", 0)) or None,
        kv_bytes_per_token=int(status.get("kvBytesPerToken", 0)) or None,
        state_bytes=int(status.get("stateBytes", 0)) or None,
    )
    return Found(weights=weights, model=state, sizes=sizes)


def _why(status: Mapping[str, Any]) -> str:
    """What the artifact's own Ready condition says."""
    ready = {c["type"]: c for c in status.get("conditions", ())}.get("Ready", {})
    return str(ready.get("message") or "not cached yet")
