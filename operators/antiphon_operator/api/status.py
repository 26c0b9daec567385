"""The statuses of the kinds as typed values; their schemas come from here (control speed, pure).

Must not know: how a status is observed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from antiphon.core.document.part import Model

Timestamp = str  # RFC 3339, UTC, whole seconds


class Condition(Model):
    """One observation about an object, after the Kubernetes conventions."""

    type: str = Field(description="What is observed.", max_length=64)
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, as one word; the troubleshooting page has a heading for each.", max_length=64)
    message: str = Field(default="", description="Why, for people.", max_length=1024)
    last_transition_time: Timestamp = Field(description="When status last changed.", max_length=32)
    observed_generation: int = Field(default=0, description="Generation of the spec it speaks of.")


class PoolStatus(Model):
    """One pool's sizes."""

    name: str = Field(description="Name of the pool.", max_length=32)
    role: str = Field(description="Role of its workers.", max_length=16)
    desired: int = Field(description="Workers wanted before limits.")
    target: int = Field(description="Workers aimed at now, within bounds, ratios and budget.")
    ready: int = Field(description="Workers that run and are ready.")
    pending: int = Field(default=0, description="Workers whose pods can't be scheduled.")
    message: str = Field(default="", description="What holds it back.", max_length=1024)


class StageTimes(Model):
    """When the start of the current revision passed each stage."""

    started: Timestamp | None = Field(default=None, description="The revision was applied.", max_length=32)
    scheduled: Timestamp | None = Field(default=None, description="All pods have nodes.", max_length=32)
    image_pulled: Timestamp | None = Field(default=None, description="All containers have started.", max_length=32)
    weights_ready: Timestamp | None = Field(default=None, description="All workers have loaded weights.", max_length=32)
    engine_ready: Timestamp | None = Field(default=None, description="All pools serve.", max_length=32)


class RolloutStatus(Model):
    """Where a rollout stands."""

    revision: str = Field(description="Revision being brought in.", max_length=64)
    strategy: str = Field(default="", description="Strategy in use; Recreate where Surge would exceed the budget.", max_length=16)
    step: str = Field(default="", description="What is done or awaited now.", max_length=256)
    started_at: Timestamp = Field(description="When it began.", max_length=32)
    last_progress_at: Timestamp = Field(description="When anything last moved forward.", max_length=32)
    marker: str = Field(default="", description="Fingerprint of what was seen at the last progress.", max_length=64)
    proven: bool = Field(default=False, description="All parts were seen to run the revision.")


class LLMDeploymentStatus(Model):
    """What is known about an LLMDeployment."""

    observed_generation: int = Field(default=0, description="Generation of the spec that was acted on.")
    conditions: tuple[Condition, ...] = Field(default=(), description="Observations.", max_length=32)
    pools: tuple[PoolStatus, ...] = Field(default=(), description="The pools' sizes.", max_length=64)
    summary: str = Field(default="", description="The pools in a line: name, ready/target.", max_length=4096)
    model: str = Field(default="", description="Model name that clients send.", max_length=256)
    url: str = Field(default="", description="Address of the OpenAI-compatible HTTP API within the cluster.", max_length=512)
    grpc_url: str = Field(default="", description="Address of the gRPC API within the cluster.", max_length=512)
    revision: str = Field(default="", description="Revision that is applied.", max_length=64)
    cluster_revision: str = Field(default="", description="Revision of what replaces all pods when it changes.", max_length=64)
    serve_revision: str = Field(default="", description="Revision of what changes in place.", max_length=64)
    last_good_revision: str = Field(default="", description="Latest revision that was ready.", max_length=64)
    failed_revision: str = Field(default="", description="Revision that missed its progress deadline.", max_length=64)
    rollout: RolloutStatus | None = Field(default=None, description="The rollout under way, or the last one.")
    stages: StageTimes | None = Field(default=None, description="Start-up of the applied revision.")
    active_cluster: str = Field(default="", description="RayCluster that serves.", max_length=253)
    route: str = Field(default="", description="HTTPRoute that leads to it.", max_length=253)
    inference_pool: str = Field(default="", description="InferencePool of its gateway replicas.", max_length=253)


class ServingPoolStatus(Model):
    """What is known about a pool."""

    observed_generation: int = Field(default=0, description="Generation of the spec that was acted on.")
    replicas: int = Field(default=0, description="Workers that exist.")
    ready_replicas: int = Field(default=0, description="Workers that are ready.")
    desired_replicas: int = Field(default=0, description="Workers wanted before limits.")
    accepted_replicas: int = Field(default=0, description="Workers aimed at, within bounds, ratios and budget.")
    selector: str = Field(default="", description="Label selector of its pods, for autoscalers.", max_length=512)
    low_since: Timestamp | None = Field(default=None, description="Since when less was wanted than is accepted.", max_length=32)
    pending_since: Timestamp | None = Field(default=None, description="Since when pods can't be scheduled.", max_length=32)
    capacity_cap: int | None = Field(default=None, description="Size that the cluster proved to have room for.")
    capacity_retry_at: Timestamp | None = Field(default=None, description="When more is tried again.", max_length=32)
    conditions: tuple[Condition, ...] = Field(default=(), description="Observations.", max_length=16)


class ExpertStatus(Model):
    """One expert of a composition."""

    name: str = Field(description="Name of the expert.", max_length=253)
    ready: bool = Field(description="Whether requests can go to it.")
    url: str = Field(default="", description="Where it is reached.", max_length=1024)
    message: str = Field(default="", description="Why it is not ready.", max_length=1024)
    resident: bool | None = Field(default=None, description="Whether it can answer at once; None = on no model pool, or unknown.")
    wake_s: float | None = Field(default=None, description="Until it could answer, as its model pool expects; None as above.")


class CompositionStatus(Model):
    """What is known about a CompositionOfExperts."""

    observed_generation: int = Field(default=0, description="Generation of the spec that was acted on.")
    conditions: tuple[Condition, ...] = Field(default=(), description="Observations.", max_length=16)
    experts: tuple[ExpertStatus, ...] = Field(default=(), description="The experts.", max_length=256)
    experts_ready: str = Field(default="", description="Ready of all experts, e.g. 3/4.", max_length=32)
    url: str = Field(default="", description="Address of the router within the cluster.", max_length=512)
    model_pool: str = Field(default="", description="Experts that share memory, e.g. 2/3 resident.", max_length=64)


class ModelArtifactStatus(Model):
    """What is known about a ModelArtifact."""

    observed_generation: int = Field(default=0, description="Generation of the spec that was acted on.")
    conditions: tuple[Condition, ...] = Field(default=(), description="Observations.", max_length=16)
    phase: str = Field(default="", description="Pending, Downloading, Cached or Failed.", max_length=16)
    claim_name: str = Field(default="", description="PersistentVolumeClaim with the weights.", max_length=253)
    path: str = Field(default="", description="Directory within the claim.", max_length=1024)
    digest: str = Field(default="", description="Digest of what was downloaded.", max_length=128)
    size_bytes: int = Field(default=0, description="Bytes that were downloaded.")
    ffn_bytes: int = Field(default=0, description="Of them, those of the layers' FFNs and experts; 0 = not known.")
    kv_bytes_per_token: int = Field(default=0, description="KV cache of one token at the checkpoint's format; 0 = not known.")
    state_bytes: int = Field(default=0, description="State of one sequence, all layers; 0 = the model has none, or not known.")
    used_by: tuple[str, ...] = Field(default=(), description="LLMDeployments that use it.", max_length=256)
