"""Finds the claim that holds a document's weights (control speed, pure).

A ModelArtifact of the same uri and revision in the same namespace is used; without one, pvc:// is mounted and anything else is
left to the workers. Must not know: how weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    model: ModelState  # of both
    draft_weights: Weights | None = None  # of the draft model, where the document has one on a claim
    sizes: WeightSizes = NOTHING_KNOWN


def uses(document: LLMDeployment, artifact: Object) -> bool:
    """True when ``document`` is served from ``artifact``, or drafted for."""
    return any(_is_of(artifact, uri, revision) for uri, revision in _sources(document))


def _sources(document: LLMDeployment) -> list[tuple[str, str | None]]:
    """Uri and revision of the model and, behind it, of the draft model, where that is resolved."""
    model, speculation = document.spec.model, document.spec.speculation
    found = [(model.uri, model.revision)]
    if speculation is not None and speculation.model is not None and speculation.model.uri is not None:
        found.append((speculation.model.uri, speculation.model.revision))
    return found


def _is_of(artifact: Object, uri: str, revision: str | None) -> bool:
    return bool(artifact["spec"]["uri"] == uri and artifact["spec"].get("revision") == revision)


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
    """The weights of ``document``, whose draft model is resolved, and of that, among ``artifacts``."""
    known = [artifact for artifact in artifacts if "deletionTimestamp" not in artifact["metadata"]]
    found, *drafts = [_find(uri, revision, known) for uri, revision in _sources(document)]
    if not drafts:
        return found
    draft, model = drafts[0], found.model
    if model.ready and not draft.model.ready:
        model = ModelState(ready=False, reason=draft.model.reason, message=f"draft model: {draft.model.message}")
    sizes = replace(found.sizes, draft_bytes=draft.sizes.total_bytes)
    return Found(weights=found.weights, model=model, draft_weights=draft.weights, sizes=sizes)


def _find(uri: str, revision: str | None, artifacts: Iterable[Object]) -> Found:
    for artifact in artifacts:
        if _is_of(artifact, uri, revision):
            return _of_artifact(artifact)
    if uri.startswith("pvc://"):
        weights = _in_place(uri)
        cached = ModelState(ready=True, reason=Reason.CACHED, message=f"claim {weights.claim}")
        return Found(weights=weights, model=cached)
    direct = ModelState(ready=True, reason=Reason.DIRECT, message="workers fetch the weights themselves")
    return Found(weights=None, model=direct)


def model_of_refused(live: Object, artifacts: Iterable[Object]) -> ModelState | None:
    """Where the weights stand that ``live`` names, though nothing is done for it; None when no artifact speaks of them."""
    model = live["spec"].get("model", {})
    for artifact in artifacts:
        if _is_of(artifact, model.get("uri"), model.get("revision")) and "deletionTimestamp" not in artifact["metadata"]:
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
