"""A revision: a document rendered once and kept, so that a newer operator changes nothing that runs (control speed, pure).

Kept as a ControllerRevision, owned by its LLMDeployment. Must not know: which revision is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon_operator.render.canonical import Json
from antiphon_operator.render.names import common_labels
from antiphon_operator.render.ray_cluster import cluster_revision, ray_cluster
from antiphon_operator.render.serve import application, source_fingerprint
from antiphon_operator.render.settings import Runtime, Settings, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """A rendered document, without sizes."""

    name: str
    ray_cluster: Json
    application: Json
    gpus_per_worker: Mapping[str, int]  # pool -> accelerators

    @property
    def cluster_revision(self) -> str:
        """Changes when all pods must be replaced."""
        return cluster_revision(self.ray_cluster)

    def num_gpus(self, sizes: Mapping[str, int]) -> int:
        """Accelerators that ``sizes`` workers use."""
        return sum(gpus * sizes.get(pool, 0) for pool, gpus in self.gpus_per_worker.items())


def render_revision(
    document: LLMDeployment,
    settings: Settings,
    weights: Weights | None,
    runtime: Runtime | None = None,
    *,
    draft_weights: Weights | None = None,
) -> Revision:
    """Render ``document`` with ``runtime``, or the operator's present defaults when it is None.

    ``draft_weights``: of its draft model, which the document names by uri.
    """
    used = runtime if runtime is not None else settings.runtime
    return Revision(
        name=source_fingerprint(document, weights, draft_weights),
        ray_cluster=ray_cluster(document, settings, used, weights, draft_weights),
        application=application(document, settings, weights, draft_weights),
        gpus_per_worker={pool.name: pool.resources.gpu for pool in document.spec.pools},
    )


def revision_object_name(deployment: str, revision: str) -> str:
    """Name of the ControllerRevision."""
    return f"{deployment}-{revision}"


def to_object(document: LLMDeployment, owner: Json, revision: Revision, number: int) -> Json:
    """The ControllerRevision that keeps ``revision``."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": revision_object_name(document.metadata.name, revision.name),
            "namespace": document.metadata.namespace,
            "labels": common_labels(document),
            "ownerReferences": [owner],
        },
        "revision": number,
        "data": {
            "revision": revision.name,
            "rayCluster": revision.ray_cluster,
            "application": revision.application,
            "gpusPerWorker": dict(revision.gpus_per_worker),
        },
    }


def from_object(value: Mapping[str, Any]) -> Revision:
    """The revision that a ControllerRevision keeps.

    Raises:
        InvalidInput: it is not one of ours.
    """
    try:
        data = value["data"]
        return Revision(
            name=data["revision"],
            ray_cluster=data["rayCluster"],
            application=data["application"],
            gpus_per_worker=data["gpusPerWorker"],
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"not a revision record: {error}", "data") from error
