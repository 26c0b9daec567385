"""The claim and the download Job of a ModelArtifact (control speed, pure).

The Job runs ``antiphon-operator fetch``, which writes into an empty directory and renames it at the end: a half-finished
download is never taken for a whole one. Its termination message is its
result, or why it failed. Must not know: how fetching works.
"""

from __future__ import annotations

from antiphon.core.document.artifact import ModelArtifact
from antiphon_operator.render.canonical import Json, literal
from antiphon_operator.render.names import LABEL_ARTIFACT, MANAGER
from antiphon_operator.render.pods import CONTAINER_SECURITY, POD_SECURITY
from antiphon_operator.render.settings import Settings, Weights


def _metadata(document: ModelArtifact, owner: Json, name: str) -> Json:
    labels = {"app.kubernetes.io/managed-by": MANAGER, LABEL_ARTIFACT: document.metadata.name}
    return {"name": name, "namespace": document.metadata.namespace, "labels": labels, "ownerReferences": [owner]}


def claim(document: ModelArtifact, owner: Json) -> Json:
    """The PersistentVolumeClaim for the weights."""
    storage = document.spec.storage
    spec: Json = {"accessModes": [storage.access_mode], "resources": {"requests": {"storage": storage.size}}}
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    metadata = _metadata(document, owner, document.metadata.name)
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def download_job(document: ModelArtifact, owner: Json, place: Weights, settings: Settings) -> Json:
    """The Job that downloads into ``place``."""
    spec = document.spec
    arguments = ["fetch", "--uri", spec.uri, "--into", place.directory]
    if spec.revision is not None:
        arguments += ["--revision", spec.revision]
    if spec.digest is not None:
        arguments += ["--digest", spec.digest]
    if spec.endpoint_url is not None:
        arguments += ["--endpoint-url", spec.endpoint_url]
    container: Json = {
        "name": "download",
        "image": spec.image or settings.artifact_image or settings.runtime.image,
        "command": ["antiphon-operator"],
        "args": [literal(argument) for argument in arguments],
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - an emptyDir of the pod's own
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePath": "/tmp/result",  # noqa: S108
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "weights", "mountPath": place.mount},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }
    if spec.credentials_secret is not None:
        container["envFrom"] = [{"secretRef": {"name": spec.credentials_secret}}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(document, owner, f"{document.metadata.name}-download"),
        "spec": {
            "backoffLimit": spec.retries,
            "activeDeadlineSeconds": spec.deadline_s,
            "template": {
                "metadata": {"labels": {LABEL_ARTIFACT: document.metadata.name}},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "securityContext": {**POD_SECURITY, "runAsUser": 1000},
                    "containers": [container],
                    "volumes": [
                        {"name": "weights", "persistentVolumeClaim": {"claimName": place.claim}},
                        {"name": "tmp", "emptyDir": {}},
                    ],
                },
            },
        },
    }
