"""Ties watches to the queue: kopf watches, every change becomes a key, one reconciler per kind does the rest (control speed).

kopf keeps no state in the objects and scans nothing: only watching is used. Must not know: what a reconciler does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

import kopf

from antiphon.core.document.spec import API_VERSION
from antiphon_operator.controller.label_watch import WATCHED_BY_LABEL, LabelWatch
from antiphon_operator.controller.observability import OperatorMetrics
from antiphon_operator.controller.resync import Resync
from antiphon_operator.controller.work_queue import Pass, WorkQueue
from antiphon_operator.kube.base import Kube
from antiphon_operator.kube.resources import COMPOSITION, LLM_DEPLOYMENT, MODEL_ARTIFACT, RAY_SERVICE, SERVING_POOL
from antiphon_operator.reconcile.llm.reconciler import REST_S

Key = tuple[str, str, str]  # kind, namespace, name
Reconcile = Callable[[str, str], Awaitable[float | None]]

WATCHED = (LLM_DEPLOYMENT, SERVING_POOL, COMPOSITION, MODEL_ARTIFACT, RAY_SERVICE)
_OURS = (LLM_DEPLOYMENT.kind, COMPOSITION.kind, MODEL_ARTIFACT.kind)
_LOG = logging.getLogger(__name__)


def keys_of(body: Mapping[str, Any]) -> list[Key]:
    """The keys to reconcile when ``body`` changes: itself, or what of ours controls it."""
    metadata = body["metadata"]
    namespace = metadata.get("namespace", "")
    if body.get("apiVersion") == API_VERSION and body.get("kind") in _OURS:
        return [(body["kind"], namespace, metadata["name"])]
    return [
        (owner["kind"], namespace, owner["name"])
        for owner in metadata.get("ownerReferences", ())
        if owner.get("controller") and owner.get("apiVersion") == API_VERSION and owner.get("kind") in _OURS
    ]


def drafts_with(body: Mapping[str, Any]) -> str | None:
    """The LLMDeployment that the LLMDeployment ``body`` names as its draft model."""
    speculation = body.get("spec", {}).get("speculation") or {}
    name = (speculation.get("model") or {}).get("deploymentRef")
    return None if name is None else str(name)


class _Stopped(Exception):
    """The process was asked to end."""


class Controller:
    """Watches and reconciles until it is stopped. Owned by one event loop."""

    def __init__(
        self,
        reconcilers: Mapping[str, Reconcile],
        *,
        metrics: OperatorMetrics,
        login: Callable[[], kopf.ConnectionInfo],
        namespaces: Sequence[str] = (),
        num_workers: int = 8,
        resting: Callable[[Callable[[str, str], None], Callable[[Pass], None]], Resync] | None = None,
        identity: str = "antiphon-operator",
        kube: Kube | None = None,
    ) -> None:
        self._reconcilers = reconcilers
        self._metrics = metrics
        self._login = login
        self._namespaces = tuple(namespaces)
        self._identity = identity
        self._queue: WorkQueue[Key] = WorkQueue(self._reconcile, num_workers=num_workers, on_pass=self._passed)
        self._compositions: set[Key] = set()
        self._drafted_by: dict[Key, Key] = {}  # deployments, and the one that each names as its draft model
        self._resync = None if resting is None else resting(self._unsettled, self._looked)
        self._by_label = [
            LabelWatch(kube, resource, facts=facts, namespaces=self._namespaces, changed=self._unsettled)
            for resource, facts in (WATCHED_BY_LABEL.items() if kube is not None else ())
            if kube is not None
        ]
        self.watching = asyncio.Event()

    async def run(self) -> None:
        """Watch and reconcile until SIGTERM or SIGINT, which kopf waits for.

        Raises:
            Exception: whatever else ended the watches or the queue; the process should end.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._queue.run())
                if self._resync is not None:
                    group.create_task(self._resync.run())
                for watch in self._by_label:
                    group.create_task(watch.run())
                group.create_task(self._watch())
        except* _Stopped:
            _LOG.info("stopped")

    async def _watch(self) -> None:
        await kopf.operator(
            registry=self._registry(),
            settings=self._settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            ready_flag=self.watching,
            # Given, or kopf asks who the user is: the user of a container is often in no passwd file.
            identity=cast("Any", self._identity),
        )
        raise _Stopped

    async def _reconcile(self, key: Key) -> float | None:
        kind, namespace, name = key
        again = await self._reconcilers[kind](namespace, name)
        if self._resync is None or kind != LLM_DEPLOYMENT.kind:
            return again
        if again is None:
            self._resync.forget(namespace, name)
        elif self._resync.rest(namespace, name, again):
            return None
        return again

    def _unsettled(self, namespace: str, name: str) -> None:
        self._queue.add((LLM_DEPLOYMENT.kind, namespace, name))

    def _looked(self, done: Pass) -> None:
        self._metrics.passes.labels(kind=LLM_DEPLOYMENT.kind, result="ok").inc()
        self._metrics.seconds.labels(kind=LLM_DEPLOYMENT.kind).observe(done.seconds)

    def _passed(self, key: Key, done: Pass) -> None:
        self._metrics.passes.labels(kind=key[0], result=done.error or "ok").inc()
        self._metrics.seconds.labels(kind=key[0]).observe(done.seconds)
        self._metrics.queued.set(len(self._queue))

    def _changed(self, body: Mapping[str, Any], type_: str | None) -> None:
        """``type_`` is the watch's; None = a list brought it."""
        for key in keys_of(body):
            if key[0] == COMPOSITION.kind and type_ != "DELETED":
                self._compositions.add(key)
            elif key[0] == COMPOSITION.kind:
                self._compositions.discard(key)
            self._note_draft_model(key, body if type_ != "DELETED" else None)
            if type_ is None and self._resync is not None and key[0] == LLM_DEPLOYMENT.kind:
                # Of what a list brings, at the start above all, most is at rest: looked at together, it costs a tenth.
                self._resync.rest(key[1], key[2], REST_S, first_s=0.0)
                continue
            self._queue.add(key)
            if key[0] == LLM_DEPLOYMENT.kind:
                for composition in self._compositions:
                    if composition[1] == key[1]:
                        self._queue.add(composition)
                for deployment, named in self._drafted_by.items():
                    if named == key:
                        self._queue.add(deployment)

    def _note_draft_model(self, key: Key, body: Mapping[str, Any] | None) -> None:
        """Keep which deployment names which; None = it is gone."""
        if key[0] != LLM_DEPLOYMENT.kind:
            return
        name = None if body is None else drafts_with(body)
        if name is None:
            self._drafted_by.pop(key, None)
        else:
            self._drafted_by[key] = (key[0], key[1], name)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> kopf.ConnectionInfo:
            return self._login()

        async def changed(body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002 - kopf calls it by that name
            self._changed(dict(body), type)

        for resource in WATCHED:
            kopf.on.event(resource.group, resource.version, resource.plural, registry=registry)(changed)
        return registry

    @staticmethod
    def _settings() -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.scanning.disabled = True  # needs no right to read CustomResourceDefinitions
        settings.posting.enabled = False  # events are ours, once per change
        settings.watching.server_timeout = 300  # whole seconds: API servers refuse a fraction
        settings.watching.inactivity_timeout = 330.0  # a watch silent for longer is dead
        settings.watching.connect_timeout = 10.0
        settings.queueing.idle_timeout = 0.2  # a change becomes a key at once: nothing of an object is kept for later
        settings.queueing.exit_timeout = 0.2
        return settings
