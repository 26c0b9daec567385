"""Ties watches to the queue: kopf watches, every change becomes a key, one reconciler per kind does the rest (control speed).

kopf keeps no state in the objects and scans nothing: only watching is used. Must not know: what a reconciler does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import kopf

from antiphon.core.spec import API_VERSION
from antiphon_operator.kube.resources import COMPOSITION, LLM_DEPLOYMENT, MODEL_ARTIFACT, RAY_SERVICE, SERVING_POOL
from antiphon_operator.observability import OperatorMetrics
from antiphon_operator.work_queue import Pass, WorkQueue

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
    ) -> None:
        self._reconcilers = reconcilers
        self._metrics = metrics
        self._login = login
        self._namespaces = tuple(namespaces)
        self._queue: WorkQueue[Key] = WorkQueue(self._reconcile, num_workers=num_workers, on_pass=self._passed)
        self._compositions: set[Key] = set()
        self.watching = asyncio.Event()

    async def run(self) -> None:
        """Watch and reconcile.

        Raises:
            Exception: whatever ended the watches or the queue; the process should end.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run())
            group.create_task(self._watch())

    async def _watch(self) -> None:
        await kopf.operator(
            registry=self._registry(),
            settings=self._settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            ready_flag=self.watching,
        )
        raise RuntimeError("the watches ended")

    async def _reconcile(self, key: Key) -> float | None:
        kind, namespace, name = key
        return await self._reconcilers[kind](namespace, name)

    def _passed(self, key: Key, done: Pass) -> None:
        self._metrics.passes.labels(kind=key[0], result=done.error or "ok").inc()
        self._metrics.seconds.labels(kind=key[0]).observe(done.seconds)
        self._metrics.queued.set(len(self._queue))

    def _changed(self, body: Mapping[str, Any]) -> None:
        for key in keys_of(body):
            if key[0] == COMPOSITION.kind:
                self._compositions.add(key)
            self._queue.add(key)
            if key[0] == LLM_DEPLOYMENT.kind:
                for composition in self._compositions:
                    if composition[1] == key[1]:
                        self._queue.add(composition)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> kopf.ConnectionInfo:
            return self._login()

        async def changed(body: kopf.Body, **_: Any) -> None:
            self._changed(dict(body))

        for resource in WATCHED:
            kopf.on.event(resource.group, resource.version, resource.plural, registry=registry)(changed)
        return registry

    @staticmethod
    def _settings() -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.scanning.disabled = True  # needs no right to read CustomResourceDefinitions
        settings.posting.enabled = False  # events are ours, once per change
        settings.watching.server_timeout = 300.0
        settings.watching.inactivity_timeout = 330.0  # a watch silent for longer is dead
        settings.watching.connect_timeout = 10.0
        return settings
