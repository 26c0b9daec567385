"""How an ``LLMDeployment`` lives on a cluster: scaling, SLO, ratios, rollout, pods (control speed).

``antiphon serve`` reads and checks them like every other field and then leaves them alone; the operator acts on them.

Must not know: how pools are scaled or rolled out.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import FieldsError, LabelValue, Line, Model, as_tuple

RESERVED_POOL_NAMES = ("gateway", "headgroup")  # the gateway's own deployment and worker group, and Ray's head group
MAX_RATIOS = 16
WAKE_TIMEOUT_S = 600.0  # of a pool that may scale to zero: a node, an image and the weights take minutes

SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]


class ScalingMode(StrEnum):
    """Who decides how many workers a pool has."""

    STATIC = "Static"
    EXTERNAL = "External"
    SLO = "SLO"


class RolloutStrategy(StrEnum):
    """How a new revision replaces the old one."""

    SURGE = "Surge"
    RECREATE = "Recreate"


class ScalingSpec(Model):
    """How the number of workers of a pool is decided."""

    mode: ScalingMode = Field(
        default=ScalingMode.STATIC,
        strict=False,
        description="Static = replicas of the pool; External = the scale subresource of its ServingPool (kubectl scale, "
        "an autoscaler); SLO = from measured latencies, queues and KV usage.",
    )
    min_replicas: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="Fewest workers; needed unless mode is Static. 0 lets the pool sleep.",
    )
    max_replicas: int | None = Field(default=None, ge=1, le=10_000, description="Most workers; needed unless mode is Static.")
    scale_down_window_s: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        description="A lower target must have held this long before it is followed.",
    )
    metrics_max_age_s: float = Field(
        default=60.0, gt=0, le=3600, description="Metrics older than this are stale: the size is held."
    )
    pending_deadline_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Workers unschedulable for this long lower the target to what runs.",
    )
    target_queue_per_worker: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="SLO: waiting requests per worker to aim at; None = not used.",
    )
    target_kv_usage: float | None = Field(
        default=None, gt=0, le=1, description="SLO: share of KV blocks in use to aim at; None = not used."
    )

    @model_validator(mode="after")
    def _bounds(self) -> ScalingSpec:
        if self.mode is not ScalingMode.STATIC and (self.min_replicas is None or self.max_replicas is None):
            missing = [("minReplicas", self.min_replicas), ("maxReplicas", self.max_replicas)]
            raise FieldsError([(path, f"mode {self.mode.value} needs it") for path, value in missing if value is None])
        if self.min_replicas is not None and self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"minReplicas: {self.min_replicas} is above maxReplicas {self.max_replicas}")
        return self


class SloSpec(Model):
    """Latencies to keep, at the 95th percentile; pools with scaling mode SLO follow them."""

    ttft_ms: float | None = Field(
        default=None,
        gt=0,
        le=3_600_000,
        description="Time to first token, in milliseconds; None = not a goal.",
    )
    tpot_ms: float | None = Field(
        default=None,
        gt=0,
        le=3_600_000,
        description="Time per output token, in milliseconds; None = not a goal.",
    )


class RatioSpec(Model):
    """Bounds on the quotient of two pools' sizes, e.g. FFN workers per attention worker."""

    numerator: Line = Field(description="Name of the pool above the line.", min_length=1, max_length=32)
    denominator: Line = Field(description="Name of the pool below the line.", min_length=1, max_length=32)
    min: float | None = Field(default=None, gt=0, le=10_000, description="Least quotient; None = unbounded.")
    max: float | None = Field(default=None, gt=0, le=10_000, description="Greatest quotient; None = unbounded.")

    @model_validator(mode="after")
    def _ordered(self) -> RatioSpec:
        if self.numerator == self.denominator:
            raise ValueError("denominator: must be another pool than the numerator")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} is above max {self.max:g}")
        return self


class RolloutSpec(Model):
    """How a new revision is brought in."""

    strategy: RolloutStrategy = Field(
        default=RolloutStrategy.SURGE,
        strict=False,
        description="Surge = the new pools start beside the old ones, then traffic moves (needs twice the accelerators "
        "for a while); Recreate = the old pools stop first (no spare accelerators, an interruption).",
    )
    paused: bool = Field(default=False, description="Keep the revision that is applied; scaling goes on.")
    progress_deadline_s: float = Field(
        default=1800.0,
        gt=0,
        le=86_400,
        description="A rollout without progress for this long has failed.",
    )
    auto_rollback: bool = Field(default=True, description="Return to the last good revision when a rollout fails.")


class SecretEnvSpec(Model):
    """One environment variable of every worker, read from a Secret; the value never enters a document or status."""

    name: str = Field(description="Name of the environment variable.", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)
    secret: SecretName = Field(description="Name of the Secret, in the deployment's namespace.")
    key: Line = Field(description="Key within the Secret.", min_length=1, max_length=253)


class TolerationSpec(Model):
    """A taint that pods of the pool tolerate."""

    key: Line | None = Field(default=None, description="Key of the taint; None with operator Exists = every taint.", max_length=316)
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="Exists = any value, Equal = the value given.")
    value: LabelValue | None = Field(default=None, description="Value of the taint, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; None = every effect."
    )


class GatewayParentSpec(Model):
    """A Gateway of the Gateway API that clients come through."""

    name: SecretName = Field(description="Name of the Gateway.")
    namespace: SecretName | None = Field(default=None, description="Its namespace; None = the deployment's.")
    section_name: Line | None = Field(default=None, description="One of its listeners; None = all.", min_length=1, max_length=253)


class GatewaySpec(Model):
    """An HTTPRoute of the Gateway API that leads to the deployment's HTTP API."""

    parent_refs: tuple[GatewayParentSpec, ...] = Field(
        description="The Gateways; they must allow routes of this namespace.", min_length=1, max_length=8
    )
    hostnames: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)], ...] = Field(
        default=(), description="Host names that clients use; empty = every one of the Gateway's.", max_length=16
    )

    inference_pool: bool = Field(
        default=False,
        description="The route leads to an InferencePool of the gateway replicas with their endpoint picker, which keeps a "
        "conversation at one replica. The Gateway must know the Gateway API Inference Extension.",
    )

    _lists = field_validator("parent_refs", "hostnames", mode="before")(as_tuple)


class KeySecretSpec(Model):
    """The Secret that makes pods parts of one deployment."""

    secret: SecretName = Field(description="Name of the Secret.")
    key: str = Field(
        default="key",
        description="Its key: one key of at least 32 characters a line.",
        pattern=r"^[-._a-zA-Z0-9]+$",
        max_length=253,
    )


class KubernetesSpec(Model):
    """What the pods need that a laptop does not."""

    image: Line | None = Field(
        default=None,
        description="Container image of head and workers; None = the operator's default.",
        min_length=1,
        max_length=512,
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the image is pulled."
    )
    image_pull_secrets: tuple[SecretName, ...] = Field(
        default=(), description="Names of Secrets with registry credentials.", max_length=16
    )
    ray_version: str | None = Field(
        default=None,
        description="Ray's version inside the image; None = the operator's default.",
        pattern=r"^[0-9]+\.[0-9]+\.[0-9]+([-+.][-+.0-9A-Za-z]*)?$",
        max_length=32,
    )
    service_account_name: SecretName | None = Field(
        default=None, description="Service account of the pods; None = the namespace's default, without a token."
    )
    priority_class_name: SecretName | None = Field(default=None, description="Priority class of the pods; None = the default.")
    secret_env: tuple[SecretEnvSpec, ...] = Field(
        default=(), description="Environment variables from Secrets, for head and workers.", max_length=64
    )
    secret_files: tuple[SecretName, ...] = Field(
        default=(),
        description="Secrets whose keys are files in the pods of gateway and workers, under /etc/antiphon/secrets/<name>/: API "
        "keys, or the doors' certificate.",
        max_length=16,
    )
    key_secret: KeySecretSpec | None = Field(
        default=None,
        description="Key of the deployment, by which its parts know each other; None = agreed on through their Ray cluster.",
    )
    network_policy: bool = Field(
        default=True,
        description="Restrict traffic to the pods: within the deployment, from clients to the gateway, from KubeRay.",
    )
    gateway: GatewaySpec | None = Field(default=None, description="Gateways that lead to the HTTP API; None = no HTTPRoute.")
    drain_s: float = Field(default=60.0, ge=0, le=3600, description="Time that requests in flight get before a worker stops.")

    _lists = field_validator("image_pull_secrets", "secret_env", "secret_files", mode="before")(as_tuple)
