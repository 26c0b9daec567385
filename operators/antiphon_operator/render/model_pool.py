"""The model pool of a composition with tiers: one pod that holds several experts in shared memory (control speed, pure).

    CompositionOfExperts with tiers, and LLMDeployments that are suspended ──► one Deployment of one pod: antiphon serve of them all
                                                                               ├── gateway and router of the composition
                                                                               └── model pool: resident, in host memory, on disk

A suspended LLMDeployment has no workers of its own, so that its weights are in memory once. The pod runs what a laptop runs on the
same documents. Must not know: which experts are resident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.pools import parse_quantity
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Problem
from antiphon.core.tiers import tier_problems
from antiphon_operator.planning.memory import MARGIN, NOTHING_KNOWN, RUNTIME_BYTES, WeightSizes, memory_need
from antiphon_operator.render.canonical import Json, to_yaml
from antiphon_operator.render.names import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, http_scheme
from antiphon_operator.render.pods import FromSecrets, deployment_key, secret_files
from antiphon_operator.render.serve import worker_document
from antiphon_operator.render.settings import Weights

_GIB = float(2**30)
_SHM_BYTES = 256 << 20  # links of the pod's own processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An expert on the model pool: its document, and the claim that its weights are on; None = the pod fetches them."""

    document: LLMDeployment
    weights: Weights | None
    draft_weights: Weights | None = None  # the same of its draft model
    sizes: WeightSizes = NOTHING_KNOWN

    @property
    def name(self) -> str:
        """Name of the LLMDeployment."""
        return self.document.metadata.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMemoryNeed:
    """What the pod needs, in bytes."""

    resident: int
    host: int
    kv_caches: int  # of every member: all of them may be resident
    runtimes: int = 2 * RUNTIME_BYTES  # gateway with router, model pool

    @property
    def total(self) -> int:
        """All of it, and the margin."""
        return int((self.resident + self.host + self.kv_caches + self.runtimes) * (1 + MARGIN))

    def __str__(self) -> str:
        parts = (("resident", self.resident), ("host", self.host), ("KV caches", self.kv_caches), ("runtimes", self.runtimes))
        listed = " + ".join(f"{name} {size / _GIB:.2f}" for name, size in parts if size)
        return f"{self.total / _GIB:.2f} GiB ({listed}, {MARGIN:.0%} on top)"


def pool_memory(composition: CompositionOfExperts, members: Sequence[Member]) -> PoolMemoryNeed:
    """What the model pool of ``composition``, which has tiers, needs."""
    tiers = composition.spec.tiers
    assert tiers is not None
    needs = [memory_need(m.document.spec, m.document.spec.pools[0], m.sizes) for m in members]
    return PoolMemoryNeed(
        resident=tiers.resident_memory_bytes, host=tiers.host_memory_bytes, kv_caches=sum(need.kv_cache or 0 for need in needs)
    )


def pool_problems(composition: CompositionOfExperts, members: Sequence[Member]) -> list[Problem]:
    """Why these experts can't share a pod, each with its field."""
    documents = [member.document for member in members]
    found = tier_problems(documents, [composition])
    if composition.spec.router.replicas > 1:
        message = "a model pool is one process with its router inside: spec.tiers needs 1"
        found.append(Problem(path="spec.router.replicas", message=message))
    if composition.spec.router.api_keys_secret is not None:
        message = "the model pool's door takes the keys that its members' spec.endpoint names"
        found.append(Problem(path="spec.router.apiKeysSecret", message=message))
    first = documents[0]
    for document in documents[1:]:
        for field, shared_by in _SHARED.items():
            if shared_by(document) != shared_by(first):
                message = f"is the model pool's, which {document.metadata.name} and {first.metadata.name} share: they differ"
                found.append(Problem(path=f"LLMDeployment/{document.metadata.name}: {field}", message=message))
    given = composition.spec.router.resources.memory
    need = pool_memory(composition, members)
    if not found and given is not None and parse_quantity(given) < need.total:
        message = f"{given} is too little for the model pool, which needs {need}"
        found.append(Problem(path="spec.router.resources.memory", message=message))
    return found


def _door(document: LLMDeployment) -> Json:
    """What its endpoint says, ports and address aside: those are the pod's."""
    return document.spec.endpoint.model_dump(mode="json", exclude={"host", "http_port", "grpc_port", "replicas", "wake_timeout_s"})


# What a pod has once, whoever of its members says it.
_SHARED: Mapping[str, Callable[[LLMDeployment], object]] = {
    "spec.endpoint": _door,
    "spec.directory": lambda document: document.spec.directory,
    "spec.kubernetes.keySecret": lambda document: document.spec.kubernetes.key_secret,
}


def pool_documents(router: Json, members: Sequence[Member]) -> str:
    """What the pod serves: the composition as the router reads it, and every member's document, as YAML."""
    documents = [router]
    for member in members:
        value = worker_document(member.document, member.weights, member.draft_weights)
        value["metadata"] = {"name": member.name}
        value["spec"]["endpoint"] |= {"httpPort": DEFAULT_HTTP_PORT, "grpcPort": DEFAULT_GRPC_PORT}
        documents.append(value)
    return "---\n".join(to_yaml(document) for document in documents)


def pool_volumes(composition: CompositionOfExperts, members: Sequence[Member]) -> tuple[list[Json], list[Json]]:
    """Volumes and their mounts: each claim once, whoever shares it, and memory for copies of weights."""
    tiers = composition.spec.tiers
    assert tiers is not None
    size = str(tiers.host_memory_bytes + _SHM_BYTES)
    volumes: list[Json] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
    mounts: list[Json] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    claims: Mapping[str, Weights] = {each.claim: each for m in members for each in (m.weights, m.draft_weights) if each is not None}
    for index, (claim, weights) in enumerate(sorted(claims.items())):
        name = f"weights-{index}"
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": name, "mountPath": weights.mount, "readOnly": True})
    for secrets in _secrets(members):
        volumes += secrets.volumes
        mounts += secrets.mounts
    return volumes, mounts


def pool_scheme(members: Sequence[Member]) -> str:
    """http, or https where the members' one door has a certificate; http without members."""
    return http_scheme(members[0].document) if members else "http"


def _secrets(members: Sequence[Member]) -> tuple[FromSecrets, ...]:
    names = sorted({name for member in members for name in member.document.spec.kubernetes.secret_files})
    return secret_files(names), deployment_key(members[0].document.spec.kubernetes)


def pool_environment(members: Sequence[Member]) -> list[Json]:
    """Variables that members take from Secrets, each once."""
    if not members:
        return []
    found: dict[str, Json] = {}
    for member in members:
        if member.document.spec.directory.redis_url is not None:
            found["ANTIPHON_NAMESPACE"] = {"name": "ANTIPHON_NAMESPACE", "value": member.document.metadata.namespace or "default"}
        for ref in member.document.spec.kubernetes.secret_env:
            source = {"secretKeyRef": {"name": ref.secret, "key": ref.key}}
            found.setdefault(ref.name, {"name": ref.name, "valueFrom": source})
    return [found[name] for name in sorted(found)] + [each for secrets in _secrets(members) for each in secrets.variables]
