"""Watches what belongs to deployments by its label, and tells whose has changed (control speed).

kopf would watch every pod of the cluster and sort out ours here, and cannot wait for kinds that a cluster lacks: this asks the API
server for objects with our label. What an object is made of is forgotten at once; a few words about each are kept. Must not know:
what a change means for its deployment.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from antiphon_operator.kube.base import Gone, Kube, KubeError, NotFound, Object, WatchEvent, name_of
from antiphon_operator.kube.resources import HTTP_ROUTE, INFERENCE_POOL, POD, Resource
from antiphon_operator.render.names import LABEL_DEPLOYMENT, MANAGER

LABELS = {"app.kubernetes.io/managed-by": MANAGER}
_AGAIN_S = (1.0, 2.0, 5.0, 15.0, 30.0)  # after failures of the API server in a row
_MISSING_AGAIN_S = 300.0  # a kind that the cluster lacks may be installed
_LOG = logging.getLogger(__name__)

Facts = tuple[object, ...]


def facts_of(pod: Object) -> Facts:
    """What has to change of a pod for its deployment to be looked at again: ready, started or ended."""
    status = pod.get("status", {})
    conditions = tuple(sorted((c["type"], c["status"], c.get("reason", "")) for c in status.get("conditions", ())))
    states = tuple(tuple(sorted(c.get("state", {}))) for c in status.get("containerStatuses", ()))
    return (status.get("phase"), "deletionTimestamp" in pod["metadata"], conditions, states)


def wish_of(value: Object) -> Facts:
    """The same of an object that the operator wrote: what was asked of it; what its controller answers is no news."""
    metadata = value["metadata"]
    kept = [metadata.get(key) for key in ("generation", "labels", "annotations", "ownerReferences")]
    return ("deletionTimestamp" in metadata, json.dumps([*kept, value.get("spec")], sort_keys=True))


WATCHED_BY_LABEL: dict[Resource, Callable[[Object], Facts]] = {POD: facts_of, HTTP_ROUTE: wish_of, INFERENCE_POOL: wish_of}


class LabelWatch:
    """Watches ``resource`` in ``namespaces`` (none = all) and calls ``changed(namespace, deployment)``. Owned by one event loop.

    Args:
        facts: what has to differ for ``changed`` to be called.
        missing_again_s: seconds until a kind that the cluster lacks is asked for again.
    """

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        *,
        facts: Callable[[Object], Facts],
        namespaces: Sequence[str],
        changed: Callable[[str, str], None],
        missing_again_s: float = _MISSING_AGAIN_S,
    ) -> None:
        self._kube = kube
        self._resource = resource
        self._facts_of = facts
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._changed = changed
        self._missing_again_s = missing_again_s
        self._known: dict[tuple[str, str], tuple[str, Facts]] = {}  # namespace, name: whose it is, and what is known of it

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
                    async for event in self._stream(namespace, version):
                        version = event.object["metadata"]["resourceVersion"]
                        self._see(event.object, gone=event.type == "DELETED")
            except Gone:
                continue  # too old a version: list again
            except NotFound:
                told = True  # whatever there is once the kind is installed is news
                await asyncio.sleep(self._missing_again_s)
            except KubeError as error:
                wait_s = _AGAIN_S[min(failures, len(_AGAIN_S) - 1)]
                failures += 1
                _LOG.warning("%s can't be watched, again in %.0f s: %s", self._resource.plural, wait_s, error)
                await asyncio.sleep(wait_s)

    def _stream(self, namespace: str | None, version: str) -> AsyncIterator[WatchEvent]:
        return self._kube.watch(self._resource, namespace, resource_version=version, labels=LABELS)

    async def _list(self, namespace: str | None, *, told: bool) -> str:
        """Read all of them; what differs from what was known is told, but for the first time, when everything would."""
        listing = await self._kube.list(self._resource, namespace, LABELS)
        present = {(str(item["metadata"]["namespace"]), name_of(item)) for item in listing.items}
        for key in [key for key in self._known if key not in present and namespace in (None, key[0])]:
            self._tell(key[0], self._known.pop(key)[0], quiet=not told)
        for item in listing.items:
            self._see(item, quiet=not told)
        return listing.resource_version

    def _see(self, value: Object, *, gone: bool = False, quiet: bool = False) -> None:
        key = (str(value["metadata"]["namespace"]), name_of(value))
        now = (str(value["metadata"].get("labels", {}).get(LABEL_DEPLOYMENT, "")), self._facts_of(value))
        same = not gone and self._known.get(key) == now
        if gone:
            self._known.pop(key, None)
        else:
            self._known[key] = now
        self._tell(key[0], now[0], quiet=same or quiet)

    def _tell(self, namespace: str, deployment: str, *, quiet: bool) -> None:
        if deployment and not quiet:
            self._changed(namespace, deployment)
