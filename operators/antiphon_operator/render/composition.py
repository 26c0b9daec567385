"""The router of a composition: its document with every expert at an address, its Deployment and Services (control speed, pure).

The router runs the same ``antiphon coe serve`` as a laptop, on a document in which references to deployments have become addresses
and references to Secrets have become environment variables. With tiers it is the model
pool's pod as well, see ``model_pool``. Must not know: which experts are ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from antiphon.core.document.coe.expert_keys import HOSTS_SUFFIX, REQUIRED_VARIABLE
from antiphon.core.document.coe.experts import ExpertSpec, SecretKeyRef
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Problem
from antiphon_operator.render.canonical import Json, fingerprint, to_yaml
from antiphon_operator.render.model_pool import Member, pool_documents, pool_environment, pool_memory, pool_scheme, pool_volumes
from antiphon_operator.render.names import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, HEALTH_PATH, LABEL_COMPOSITION, MANAGER
from antiphon_operator.render.pods import CONTAINER_SECURITY, GRACE_MARGIN_S, POD_SECURITY, resource_requirements
from antiphon_operator.render.settings import Settings

_DIRECTORY = "/etc/antiphon"
_FILE = "composition.yaml"
_KEYS_VARIABLE = "ANTIPHON_ROUTER_API_KEYS"
_POOL_START_S = 1800  # fetching weights included; the startup probe gives as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a deployment answers, and under which model name."""

    url: str
    model: str


def router_name(composition: str) -> str:
    """Name of the router's Deployment and ConfigMap."""
    return f"{composition}-router"


def composition_service(composition: str) -> str:
    """Name of the Service that leads to the router."""
    return f"{composition}-coe"


def router_document(document: CompositionOfExperts, addresses: Mapping[str, Address], members: Sequence[Member] = ()) -> Json:
    """The document that the router reads; ``addresses`` has every referenced deployment, ``members`` those in its pod."""
    within = {member.name for member in members}
    value: Json = document.model_dump(mode="json", by_alias=True, exclude_none=True)
    value["metadata"] = {"name": document.metadata.name}
    if not within:
        value["spec"].pop("tiers", None)
    for index, (expert, spec) in enumerate(zip(value["spec"]["experts"], document.spec.experts, strict=True)):
        expert.pop("apiKeySecret", None)
        if expert.get("deploymentRef") in within:
            continue
        reference = expert.pop("deploymentRef", None)
        if reference is not None:
            address = addresses[reference]
            expert["external"] = {"url": address.url, "model": address.model}
        expert["external"].pop("apiKeySecret", None)
        if key_of(spec) is not None:
            expert["external"]["apiKeyEnv"] = key_variable(index)
    value["spec"]["router"].pop("apiKeysSecret", None)
    artifact = document.spec.router.artifact
    if artifact is not None and artifact.uri.startswith("pvc://"):
        _, path = _claim_of(artifact.uri)
        value["spec"]["router"]["artifact"]["uri"] = f"/artifact/{path}".rstrip("/")
    return value


def key_variable(index: int) -> str:
    """Environment variable with the API key of the expert at ``index``."""
    return f"ANTIPHON_EXPERT_{index}_KEY"


def key_of(expert: ExpertSpec) -> SecretKeyRef | None:
    """The secret with the key to show at an expert's door. Never a deployment's own keys: those may do everything there."""
    return expert.api_key_secret if expert.external is None else expert.external.api_key_secret


def lending_problems(document: CompositionOfExperts, members: Sequence[Member]) -> list[Problem]:
    """Why the router would lend its experts' keys to whoever reaches it; none where its document says that it shall."""
    router, within = document.spec.router, {member.name for member in members}
    asks = any(asks_for_keys(member.document) for member in members) if members else router.api_keys_secret is not None
    if asks or router.lends_expert_keys:
        return []
    for index, expert in enumerate(document.spec.experts):
        if expert.deployment_ref not in within and key_of(expert) is not None:
            where = "spec.endpoint.apiKeysFile of its members" if members else "spec.router.apiKeysSecret"
            message = (
                f"spec.experts[{index}] is asked with a key, and who reaches the router needs none: set {where}, or "
                "spec.router.lendsExpertKeys where something before the router says who may come in"
            )
            return [Problem(path="spec.router.apiKeysSecret", message=message)]
    return []


def asks_for_keys(document: LLMDeployment) -> bool:
    """Whether a deployment's doors ask for API keys."""
    return document.spec.endpoint.api_keys_env is not None or document.spec.endpoint.api_keys_file is not None


def _hosts_of(expert: ExpertSpec, secret: SecretKeyRef, addresses: Mapping[str, Address]) -> Json:
    """The hosts that the key may be sent to: the deployment's own, else those that the secret itself names beside the key."""
    if expert.deployment_ref is not None:
        return {"value": urlsplit(addresses[expert.deployment_ref].url).netloc}
    return {"valueFrom": {"secretKeyRef": {"name": secret.name, "key": f"{secret.key}.hosts", "optional": True}}}


def children(
    document: CompositionOfExperts,
    owner: Json,
    addresses: Mapping[str, Address],
    settings: Settings,
    members: Sequence[Member] = (),
) -> tuple[Json, ...]:
    """ConfigMap, Deployment and Service of the router, which holds the model pool of ``members`` where there are any."""
    name = router_name(document.metadata.name)
    router = router_document(document, addresses, members)
    text = pool_documents(router, members) if members else to_yaml(router)
    # Two model pools at once would need their memory twice.
    strategy: Json = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    if members:
        strategy = {"type": "Recreate"}
    labels = {
        "app.kubernetes.io/name": "antiphon-router",
        "app.kubernetes.io/managed-by": MANAGER,
        LABEL_COMPOSITION: document.metadata.name,
    }
    selector = {LABEL_COMPOSITION: document.metadata.name}

    def metadata(child: str) -> Json:
        return {
            "name": child,
            "namespace": document.metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner],
        }

    template: Json = {
        "metadata": {"labels": labels, "annotations": {"serving.antiphon.dev/configuration": fingerprint(text, 16)}},
        "spec": _pod(document, addresses, settings, members),
    }
    ports = [
        {"name": "http", "port": DEFAULT_HTTP_PORT, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"},
        {
            "name": "grpc",
            "port": DEFAULT_GRPC_PORT,
            "targetPort": "grpc",
            "protocol": "TCP",
            "appProtocol": "kubernetes.io/h2c",
        },
    ]
    return (
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(name), "data": {_FILE: text}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata(name),
            "spec": {
                "replicas": document.spec.router.replicas,
                "selector": {"matchLabels": selector},
                "strategy": strategy,
                "template": template,
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(composition_service(document.metadata.name)),
            "spec": {"type": "ClusterIP", "selector": selector, "ports": ports},
        },
    )


def _claim_of(uri: str) -> tuple[str, str]:
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path.strip("/")


def _pod(document: CompositionOfExperts, addresses: Mapping[str, Address], settings: Settings, members: Sequence[Member]) -> Json:
    environment: list[Json] = [{"name": "HOME", "value": "/tmp"}, *pool_environment(members)]  # noqa: S108 - an emptyDir of the pod's own
    within = {member.name for member in members}
    for index, expert in enumerate(document.spec.experts):
        secret = None if expert.deployment_ref in within else key_of(expert)
        if secret is not None:
            reference = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
            environment.append({"name": key_variable(index), "valueFrom": reference})
            environment.append({"name": key_variable(index) + HOSTS_SUFFIX, **_hosts_of(expert, secret, addresses)})
    # Also of a variable that a document names itself (external.apiKeyEnv): all that this pod has are others'.
    environment.append({"name": REQUIRED_VARIABLE, "value": "required"})
    accepted = document.spec.router.api_keys_secret
    if accepted is not None:
        reference = {"secretKeyRef": {"name": accepted.name, "key": accepted.key}}
        environment.append({"name": _KEYS_VARIABLE, "valueFrom": reference})
    volumes: list[Json] = [
        {"name": "configuration", "configMap": {"name": router_name(document.metadata.name)}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Json] = [
        {"name": "configuration", "mountPath": _DIRECTORY, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
    ]
    artifact = document.spec.router.artifact
    if artifact is not None and artifact.uri.startswith("pvc://"):
        claim, _ = _claim_of(artifact.uri)
        volumes.append({"name": "artifact", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "artifact", "mountPath": "/artifact", "readOnly": True})
    listen: tuple[str, ...] = ("--host", "0.0.0.0", "--http-port", str(DEFAULT_HTTP_PORT), "--grpc-port", str(DEFAULT_GRPC_PORT))  # noqa: S104 - a pod
    if accepted is not None:
        listen = (*listen, "--api-keys-env", _KEYS_VARIABLE)
    verb = ("serve", "--no-ray", "--timeout", str(_POOL_START_S)) if members else ("coe", "serve")
    door: Json = {"port": "http"} if pool_scheme(members) == "http" else {"port": "http", "scheme": "HTTPS"}
    resources = resource_requirements(document.spec.router.resources)
    if members:
        more = pool_volumes(document, members)
        volumes += more[0]
        mounts += more[1]
        if document.spec.router.resources.memory is None:
            resources["requests"]["memory"] = str(pool_memory(document, members).total)
    container: Json = {
        "name": "router",
        "image": settings.router_image or settings.runtime.image,
        "command": ["antiphon"],
        "args": [*verb, "-f", f"{_DIRECTORY}/{_FILE}", *listen],
        "env": environment,
        "ports": [
            {"name": "http", "containerPort": DEFAULT_HTTP_PORT, "protocol": "TCP"},
            {"name": "grpc", "containerPort": DEFAULT_GRPC_PORT, "protocol": "TCP"},
        ],
        "resources": resources,
        "securityContext": CONTAINER_SECURITY,
        "readinessProbe": {"httpGet": {**door, "path": "/ready" if members else HEALTH_PATH}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {**door, "path": HEALTH_PATH}, "periodSeconds": 10, "failureThreshold": 12},
        "volumeMounts": mounts,
    }
    if members:
        probe = {"httpGet": {**door, "path": HEALTH_PATH}, "periodSeconds": 5, "failureThreshold": _POOL_START_S // 5}
        container["startupProbe"] = probe
    pod: Json = {
        "automountServiceAccountToken": False,
        "securityContext": {**POD_SECURITY, "runAsUser": 1000},
        "containers": [container],
        "volumes": volumes,
    }
    if members:
        drain_s = max(member.document.spec.kubernetes.drain_s for member in members)
        pod["terminationGracePeriodSeconds"] = int(drain_s) + GRACE_MARGIN_S
    return pod
