"""Reconciles one ModelArtifact: a claim, a download Job, the digest, who uses it (control speed).

    Pending --claim and Job made--> Downloading --Job succeeded, digest right--> Cached
    Downloading --Job failed, or digest wrong--> Failed

The Job reports digest, size and what the weights consist of in the termination message of its pod, and there says why it failed. A
condition says who uses the artifact; nothing of ours holds its deletion back: Kubernetes keeps the claim for as long as a pod has
it mounted. Must not know: what downloads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from antiphon.core.document.artifact import ModelArtifact
from antiphon.core.document.spec import GROUP, LLMDeployment
from antiphon_operator.api.conditions import ConditionSet, Reason, Type
from antiphon_operator.api.status import ModelArtifactStatus
from antiphon_operator.kube.base import Kube, Object, name_of, owner_reference
from antiphon_operator.kube.resources import CLAIM, JOB, LLM_DEPLOYMENT, MODEL_ARTIFACT, POD
from antiphon_operator.log_fields import note_object
from antiphon_operator.reconcile.llm.drafts import resolved
from antiphon_operator.reconcile.llm.status import Refusal, refused_status
from antiphon_operator.reconcile.llm.weights import place_of, uses
from antiphon_operator.reconcile.writer import NotOurs, Writer
from antiphon_operator.render.artifact import claim, download_job
from antiphon_operator.render.names import LABEL_ARTIFACT, MANAGER
from antiphon_operator.render.settings import Settings

FINALIZER = f"{GROUP}/in-use"
FINALIZER_MANAGER = f"{MANAGER}-finalizer"
WEIGHT_FIELDS = ("ffnBytes", "kvBytesPerToken", "stateBytes")  # what the weights consist of, as the download found them
BUSY_S = 10.0
REST_S = 600.0

_DIGEST_LENGTH = len("sha256:") + 64
_LARGEST = 2**63 - 1


class ArtifactReconciler:
    """Reconciles ModelArtifacts through ``kube``. Holds nothing between calls."""

    def __init__(self, kube: Kube, settings: Settings, *, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._settings = settings
        self._clock = clock

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Take one step for the artifact; seconds until the next, or None when it is gone.

        Raises:
            KubeError: the API server failed; try again.
        """
        live = await self._kube.get(MODEL_ARTIFACT, namespace, name)
        if live is None:
            return None
        note_object(live)
        writer = Writer(kube=self._kube, owner_uid=live["metadata"]["uid"], now_s=self._clock())
        await self._release(writer, live)
        if "deletionTimestamp" in live["metadata"]:
            return None  # what it owns goes with it
        try:
            document = ModelArtifact.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            used_by = await self._used_by(live)
            status, conditions = await self._step(writer, live, document, used_by)
            value: Mapping[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
            phase = status.phase
        except ValidationError as error:
            text = "; ".join(e["msg"] for e in error.errors(include_input=False))
            value, conditions = refused_status(live, Refusal(reason=Reason.INVALID_SPEC, message=text), now_s=writer.now_s)
            phase = "Failed"
        except NotOurs as error:
            refusal = Refusal(reason=Reason.NAME_CONFLICT, message=str(error))
            value, conditions = refused_status(live, refusal, now_s=writer.now_s)
            phase = "Failed"
        for condition in conditions.changes():
            await writer.event(live, condition, first=conditions.is_new(condition))
        await writer.status(live, value)
        return REST_S if phase in ("Cached", "Failed") else BUSY_S

    async def _release(self, writer: Writer, live: Object) -> None:
        """Take off the finalizer that earlier versions set: nothing of ours holds back a deletion when we are gone."""
        if FINALIZER in live["metadata"].get("finalizers", ()):
            metadata = {"name": name_of(live), "namespace": live["metadata"]["namespace"]}
            value = {"apiVersion": live["apiVersion"], "kind": live["kind"], "metadata": metadata}
            await writer.apply(value, manager=FINALIZER_MANAGER)

    async def _used_by(self, live: Object) -> tuple[str, ...]:
        namespace = live["metadata"]["namespace"]
        documents: dict[str, LLMDeployment] = {}
        for item in (await self._kube.list(LLM_DEPLOYMENT, namespace)).items:
            try:
                document = LLMDeployment.model_validate({k: item[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            except ValidationError:
                continue  # its own status says so
            documents[name_of(item)] = document
        return tuple(sorted(document.metadata.name for document in resolved(documents) if uses(document, live)))

    async def _step(
        self, writer: Writer, live: Object, document: ModelArtifact, used_by: tuple[str, ...]
    ) -> tuple[ModelArtifactStatus, ConditionSet]:
        previous: Mapping[str, Any] = live.get("status", {})
        place = place_of(live)
        result: Mapping[str, Any] = {}
        if document.spec.scheme == "pvc":
            phase, reason, message = "Cached", Reason.CACHED, "used in place"
        elif previous.get("phase") == "Cached" and previous.get("observedGeneration") == live["metadata"]["generation"]:
            phase, reason, message = "Cached", Reason.CACHED, "downloaded"
            result = {key: previous[key] for key in ("digest", "sizeBytes", *WEIGHT_FIELDS) if key in previous}
        else:
            await self._start(writer, live, document)
            phase, reason, message, result = await self._progress(live, document)
        conditions = ConditionSet(previous.get("conditions", ()), generation=live["metadata"]["generation"], now_s=writer.now_s)
        conditions.set(Type.ACCEPTED, True, Reason.ACCEPTED)
        conditions.set(Type.READY, phase == "Cached", reason, message)
        users = f"used by {', '.join(used_by)}" if used_by else "no LLMDeployment names it"
        conditions.set(Type.IN_USE, bool(used_by), Reason.IN_USE if used_by else Reason.NOT_IN_USE, users)
        status = ModelArtifactStatus(
            observed_generation=live["metadata"]["generation"],
            conditions=conditions.values,
            phase=phase,
            claim_name=place.claim,
            path=place.path,
            digest=str(result.get("digest", ""))[:_DIGEST_LENGTH],
            size_bytes=_count(result, "sizeBytes"),
            ffn_bytes=_count(result, "ffnBytes"),
            kv_bytes_per_token=_count(result, "kvBytesPerToken"),
            state_bytes=_count(result, "stateBytes"),
            used_by=used_by[:256],
        )
        return status, conditions

    async def _start(self, writer: Writer, live: Object, document: ModelArtifact) -> None:
        owner = owner_reference(live)
        namespace = live["metadata"]["namespace"]
        own = document.spec.storage.claim_name is None
        # Most of a claim, and of a Job, can't be changed later: each is made once and left.
        if own and await self._kube.get(CLAIM, namespace, name_of(live)) is None:
            await writer.ensure(claim(document, owner), None)
        if await self._kube.get(JOB, namespace, f"{name_of(live)}-download") is None:
            await writer.ensure(download_job(document, owner, place_of(live), self._settings), None)

    async def _progress(self, live: Object, document: ModelArtifact) -> tuple[str, Reason, str, Mapping[str, Any]]:
        namespace, name = live["metadata"]["namespace"], name_of(live)
        job = await self._kube.get(JOB, namespace, f"{name}-download") or {}
        conditions = {c["type"]: c for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        pods = (await self._kube.list(POD, namespace, {LABEL_ARTIFACT: name})).items
        if "Failed" in conditions:
            told = _why_failed(pods)
            ended = conditions["Failed"].get("message", "the download Job failed")
            return "Failed", Reason.DOWNLOAD_FAILED, f"{told} ({ended})" if told else ended, {}
        if "Complete" not in conditions:
            return "Downloading", Reason.DOWNLOADING, _why_waiting(pods) or "the download Job runs", {}
        result = _result(pods)
        wanted = document.spec.digest
        if wanted is not None and result.get("digest") != wanted:
            message = f"digest is {result.get('digest')}, {wanted} was asked for"
            return "Failed", Reason.DIGEST_MISMATCH, message, result
        return "Cached", Reason.CACHED, "downloaded", result


def _ended(pods: Sequence[Object]) -> list[Mapping[str, Any]]:
    """How the containers of ``pods`` ended, oldest pod first."""
    ordered = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    states = [c.get("state", {}) for pod in ordered for c in pod.get("status", {}).get("containerStatuses", ())]
    return [state["terminated"] for state in states if "terminated" in state]


def _result(pods: Sequence[Object]) -> Mapping[str, Any]:
    """What the successful pod of the Job left as its termination message."""
    for ended in _ended(pods):
        if ended.get("exitCode") == 0:
            try:
                value = json.loads(ended.get("message", ""))
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {}


def _count(result: Mapping[str, Any], key: str) -> int:
    """A number of what the download said, whose image is the document's choice; 0 where it is none that a status can hold."""
    value = result.get(key)
    return value if isinstance(value, int) and 0 <= value <= _LARGEST else 0


def _why_failed(pods: Sequence[Object]) -> str:
    """What the last failed try said at its end; empty when it said nothing."""
    for ended in reversed(_ended(pods)):
        if ended.get("exitCode") != 0:
            said = str(ended.get("message", "")).strip()
            return said or f"{ended.get('reason', 'Error')}, exit code {ended.get('exitCode')}"
    return ""


def _why_waiting(pods: Sequence[Object]) -> str:
    """Why the running try does not run, and what the one before said; empty when it just runs."""
    waits = []
    for pod in pods:
        status = pod.get("status", {})
        waits += [c["message"] for c in status.get("conditions", ()) if c.get("reason") == "Unschedulable" and c.get("message")]
        for container in status.get("containerStatuses", ()):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                waits.append(f"{waiting['reason']}: {waiting.get('message', '')}")
    failed = _why_failed(pods)
    if waits:
        return str(waits[-1])
    return f"tried again after: {failed}" if failed else ""
