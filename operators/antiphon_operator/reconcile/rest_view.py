"""Many deployments of a namespace read at once, as a door that reads from what was read and writes nothing (control speed).

A pass over deployments at rest looks through it: nine lists serve fifty of them. A pass that wants anything else, above all to
write, ends with Unsettled and is made again through the real door, so nothing is ever decided on what was read for others.
Must not know: what a pass does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from antiphon_operator.kube.base import Kube, Labels, Listing, NotFound, Object, WatchEvent, name_of
from antiphon_operator.kube.resources import (
    CONTROLLER_REVISION,
    DISRUPTION_BUDGET,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    NETWORK_POLICY,
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
    SERVICE,
    SERVING_POOL,
    Resource,
)
from antiphon_operator.render.names import LABEL_DEPLOYMENT, RAY_ORIGIN_LABEL

# Read by the label that names the deployment; artifacts belong to none and are read whole.
_BY_LABEL: tuple[tuple[Resource, str], ...] = (
    (RAY_CLUSTER, RAY_ORIGIN_LABEL),
    *(
        (resource, LABEL_DEPLOYMENT)
        for resource in (RAY_SERVICE, POD, SERVING_POOL, CONTROLLER_REVISION, SERVICE, DISRUPTION_BUDGET, NETWORK_POLICY)
    ),
)
NUM_LISTS = len(_BY_LABEL) + 1


class Unsettled(Exception):
    """The pass is not over with looking: make it through the real door."""


class RestView:
    """``Kube`` for passes that end in nothing to do. Belongs to one namespace and the names it was read for."""

    def __init__(self, kube: Kube, objects: Mapping[Resource, Mapping[str, tuple[Object, ...]]], artifacts: Listing) -> None:
        self._kube = kube
        self._objects = objects
        self._artifacts = artifacts

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """See Kube; the deployment's document is read anew, its RayService was read with the others."""
        if resource == LLM_DEPLOYMENT:
            return await self._kube.get(resource, namespace, name)
        if resource != RAY_SERVICE:
            raise Unsettled(f"reads {resource.plural} {name}")
        return next((item for item in self._objects[resource].get(name, ()) if name_of(item) == name), None)

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Listing:
        """See Kube."""
        if resource == MODEL_ARTIFACT and labels is None:
            return self._artifacts
        wanted = [value for value in (labels or {}).values() if isinstance(value, str)]
        if resource not in self._objects or len(wanted) != 1:
            raise Unsettled(f"lists {resource.plural}")
        return Listing(items=self._objects[resource].get(wanted[0], ()), resource_version="")

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        labels: Labels | None = None,
        timeout_s: float = 300.0,
    ) -> AsyncIterator[WatchEvent]:
        """See Kube; ends the pass."""
        raise Unsettled(f"watches {resource.plural}")

    async def apply(self, value: Object, *, manager: str, force: bool = False) -> Object:
        """See Kube; ends the pass."""
        raise Unsettled(f"writes {value['kind']} {name_of(value)}")

    async def apply_status(self, value: Object, *, manager: str) -> Object:
        """See Kube; ends the pass."""
        raise Unsettled(f"writes the status of {value['kind']} {name_of(value)}")

    async def json_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Sequence[Object], *, manager: str
    ) -> Object:
        """See Kube; ends the pass."""
        raise Unsettled(f"patches {resource.plural} {name}")

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """See Kube; ends the pass."""
        raise Unsettled(f"deletes {resource.plural} {name}")


async def read_at_once(kube: Kube, namespace: str, names: Iterable[str]) -> RestView:
    """Read all that passes over the deployments ``names`` read, but their documents.

    Raises:
        KubeError: the API server failed.
    """
    wanted = frozenset(names)
    objects: dict[Resource, Mapping[str, tuple[Object, ...]]] = {}
    for resource, label in _BY_LABEL:
        try:
            listing = await kube.list(resource, namespace, {label: wanted})
        except NotFound as error:
            raise Unsettled(f"there are no {resource.plural}") from error
        found: dict[str, list[Object]] = {}
        for item in listing.items:
            found.setdefault(item["metadata"]["labels"][label], []).append(item)
        objects[resource] = {name: tuple(items) for name, items in found.items()}
    return RestView(kube, objects, await kube.list(MODEL_ARTIFACT, namespace))
