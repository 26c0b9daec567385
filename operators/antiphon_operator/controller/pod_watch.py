"""Watches the pods of deployments, and tells whose have become or ceased to be ready, started or ended (control speed).

kopf would watch every pod of the cluster and sort out ours here: this asks the API server for those with our label. What a pod is
made of is forgotten at once; a few words about each are kept. Must not know: what a pod's state means for its deployment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from antiphon_operator.kube.base import Gone, Kube, KubeError, Object, name_of
from antiphon_operator.kube.resources import POD
from antiphon_operator.render.names import LABEL_DEPLOYMENT, MANAGER

LABELS = {"app.kubernetes.io/managed-by": MANAGER}
_AGAIN_S = (1.0, 2.0, 5.0, 15.0, 30.0)  # after failures of the API server in a row
_LOG = logging.getLogger(__name__)

Facts = tuple[object, ...]


def facts_of(pod: Object) -> Facts:
    """What has to change for a deployment to be looked at again."""
    status = pod.get("status", {})
    conditions = tuple(sorted((c["type"], c["status"], c.get("reason", "")) for c in status.get("conditions", ())))
    states = tuple(tuple(sorted(c.get("state", {}))) for c in status.get("containerStatuses", ()))
    return (status.get("phase"), "deletionTimestamp" in pod["metadata"], conditions, states)


class PodWatch:
    """Watches ``namespaces`` (none = all) and calls ``changed(namespace, deployment)``. Owned by one event loop."""

    def __init__(self, kube: Kube, *, namespaces: Sequence[str], changed: Callable[[str, str], None]) -> None:
        self._kube = kube
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._changed = changed
        self._facts: dict[tuple[str, str], Facts] = {}

    async def run(self) -> None:
        """Watch until cancelled; failures of the API server are waited out."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(self._watch(namespace))

    async def _watch(self, namespace: str | None) -> None:
        failures, told = 0, False
        while True:
            try:
                version = await self._list(namespace, told=told)
                failures, told = 0, True
                while True:
                    async for event in self._kube.watch(POD, namespace, resource_version=version, labels=LABELS):
                        version = event.object["metadata"]["resourceVersion"]
                        self._see(event.object, gone=event.type == "DELETED")
            except Gone:
                continue  # too old a version: list again
            except KubeError as error:
                wait_s = _AGAIN_S[min(failures, len(_AGAIN_S) - 1)]
                failures += 1
                _LOG.warning("pods can't be watched, again in %.0f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)

    async def _list(self, namespace: str | None, *, told: bool) -> str:
        """Read all pods; what differs from what was known is told, but for the first time, when everything would."""
        listing = await self._kube.list(POD, namespace, LABELS)
        present = {(str(pod["metadata"]["namespace"]), name_of(pod)) for pod in listing.items}
        for key in [key for key in self._facts if key not in present and namespace in (None, key[0])]:
            del self._facts[key]
        for pod in listing.items:
            self._see(pod, quiet=not told)
        return listing.resource_version

    def _see(self, pod: Object, *, gone: bool = False, quiet: bool = False) -> None:
        key = (str(pod["metadata"]["namespace"]), name_of(pod))
        deployment = pod["metadata"].get("labels", {}).get(LABEL_DEPLOYMENT, "")
        facts = facts_of(pod)
        same = not gone and self._facts.get(key) == facts
        if gone:
            self._facts.pop(key, None)
        else:
            self._facts[key] = facts
        if deployment and not same and not quiet:
            self._changed(key[0], deployment)
