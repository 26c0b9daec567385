"""Reconciles one ModelArtifact: a claim, a download Job, the digest, who uses it (control speed).

    Pending --claim and Job made--> Downloading --Job succeeded, digest right--> Cached
    Downloading --Job failed, or digest wrong--> Failed

The Job reports digest and size in the termination message of its pod. While a document uses the artifact, a finalizer holds its
deletion back and a condition says who uses it; it is taken off as soon as nobody does. Must not know: what downloads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from antiphon.core.document.artifact import ModelArtifact
from antiphon.core.document.spec import GROUP, LLMDeployment
from antiphon_operator.api.conditions import ConditionSet, Reason, Type
from antiphon_operator.api.status import ModelArtifactStatus
from antiphon_operator.kube.base import Kube, Object, name_of, owner_reference
from antiphon_operator.kube.resources import CLAIM, JOB, LLM_DEPLOYMENT, MODEL_ARTIFACT, POD
from antiphon_operator.log_fields import note_object
from antiphon_operator.reconcile.llm.status import Refusal, refused_status
from antiphon_operator.reconcile.llm.weights import place_of, uses
from antiphon_operator.reconcile.writer import NotOurs, Writer
from antiphon_operator.render.artifact import claim, download_job
from antiphon_operator.render.names import LABEL_ARTIFACT, MANAGER
from antiphon_operator.render.settings import Settings

FINALIZER = f"{GROUP}/in-use"
FINALIZER_MANAGER = f"{MANAGER}-finalizer"
BUSY_S = 10.0
REST_S = 600.0


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
        try:
            document = ModelArtifact.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            used_by = await self._used_by(live)
            await self._hold(writer, live, in_use=bool(used_by))
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
        if "deletionTimestamp" in live["metadata"] and phase != "Failed" and not value.get("usedBy"):
            return None  # it goes now, and what it owns with it
        for condition in conditions.changes():
            await writer.event(live, condition)
        await writer.status(live, value)
        return REST_S if "deletionTimestamp" not in live["metadata"] and phase in ("Cached", "Failed") else BUSY_S

    async def _hold(self, writer: Writer, live: Object, *, in_use: bool) -> None:
        held = FINALIZER in live["metadata"].get("finalizers", ())
        if held == in_use or ("deletionTimestamp" in live["metadata"] and in_use):
            return
        metadata = {"name": name_of(live), "namespace": live["metadata"]["namespace"]}
        value = {"apiVersion": live["apiVersion"], "kind": live["kind"], "metadata": metadata}
        if in_use:
            value["metadata"] = {**metadata, "finalizers": [FINALIZER]}
        await writer.apply(value, manager=FINALIZER_MANAGER)

    async def _used_by(self, live: Object) -> tuple[str, ...]:
        namespace = live["metadata"]["namespace"]
        names = []
        for item in (await self._kube.list(LLM_DEPLOYMENT, namespace)).items:
            try:
                document = LLMDeployment.model_validate({k: item[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            except ValidationError:
                continue  # its own status says so
            if uses(document, live):
                names.append(name_of(item))
        return tuple(sorted(names))

    async def _step(
        self, writer: Writer, live: Object, document: ModelArtifact, used_by: tuple[str, ...]
    ) -> tuple[ModelArtifactStatus, ConditionSet]:
        previous: Mapping[str, Any] = live.get("status", {})
        place = place_of(live)
        deleting = "deletionTimestamp" in live["metadata"]
        result: Mapping[str, Any] = {}
        if document.spec.scheme == "pvc":
            phase, reason, message = "Cached", Reason.CACHED, "used in place"
        elif previous.get("phase") == "Cached" and previous.get("observedGeneration") == live["metadata"]["generation"]:
            phase, reason, message = "Cached", Reason.CACHED, "downloaded"
            result = {"digest": previous.get("digest", ""), "sizeBytes": previous.get("sizeBytes", 0)}
        elif deleting:
            phase, reason, message = "Pending", Reason.DOWNLOADING, "it is being deleted"
        else:
            await self._start(writer, live, document)
            phase, reason, message, result = await self._progress(live, document)
        conditions = ConditionSet(previous.get("conditions", ()), generation=live["metadata"]["generation"], now_s=writer.now_s)
        conditions.set(Type.ACCEPTED, True, Reason.ACCEPTED)
        conditions.set(Type.READY, phase == "Cached", reason, message)
        users = ", ".join(used_by)
        if deleting and used_by:
            conditions.set(Type.IN_USE, True, Reason.DELETION_BLOCKED, f"still used by {users}: delete those first")
        else:
            conditions.set(Type.IN_USE, bool(used_by), Reason.IN_USE if used_by else Reason.NOT_IN_USE, users)
        status = ModelArtifactStatus(
            observed_generation=live["metadata"]["generation"],
            conditions=conditions.values,
            phase=phase,
            claim_name=place.claim,
            path=place.path,
            digest=str(result.get("digest", "")),
            size_bytes=int(result.get("sizeBytes", 0)),
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
        if "Failed" in conditions:
            return "Failed", Reason.DOWNLOAD_FAILED, conditions["Failed"].get("message", "the download Job failed"), {}
        if "Complete" not in conditions:
            return "Downloading", Reason.DOWNLOADING, "the download Job runs", {}
        result = await self._result(namespace, name)
        wanted = document.spec.digest
        if wanted is not None and result.get("digest") != wanted:
            message = f"digest is {result.get('digest')}, {wanted} was asked for"
            return "Failed", Reason.DIGEST_MISMATCH, message, result
        return "Cached", Reason.CACHED, "downloaded", result

    async def _result(self, namespace: str, name: str) -> Mapping[str, Any]:
        """What the successful pod of the Job left as its termination message."""
        for pod in (await self._kube.list(POD, namespace, {LABEL_ARTIFACT: name})).items:
            for container in pod.get("status", {}).get("containerStatuses", ()):
                ended = container.get("state", {}).get("terminated", {})
                if ended.get("exitCode") == 0:
                    try:
                        value = json.loads(ended.get("message", ""))
                    except ValueError:
                        continue
                    if isinstance(value, dict):
                        return value
        return {}
