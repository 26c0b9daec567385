"""A pool of a deployment's document, and ``ServingPool``, the child kind that owns its scale subresource (control speed).

The operator writes ``ServingPool``; people and autoscalers write only its ``spec.replicas``, through ``/scale``.

Must not know: how a size is reached, which pools a topology needs.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import (
    EnvValue,
    FieldsError,
    LabelValue,
    Line,
    Metadata,
    Model,
    as_tuple,
    check_dns_label,
    check_label_keys,
    check_variables,
)
from antiphon.core.document.policies import RESERVED_POOL_NAMES, ScalingMode, ScalingSpec, TolerationSpec
from antiphon.core.ids import Role

PoolRole = Literal["monolith", "prefill", "decode", "attention", "ffn"]
DeviceName = Literal["auto", "cpu", "cuda"]


def parse_quantity(text: str) -> float:
    """A Kubernetes quantity ("500m", "2Gi", "1") as a number.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti)?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity such as 500m, 2 or 4Gi")
    factors = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * factors.get(match[2] or "", 1.0)


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$", max_length=32)]


class Parallelism(Model):
    """How one copy of the pool's weights is spread over its workers (FFN pools)."""

    tensor: int = Field(default=1, ge=1, le=1024, description="Slices of the FFN's intermediate dimension.")
    expert: int = Field(default=1, ge=1, le=4096, description="Groups of experts.")

    @property
    def num_shards(self) -> int:
        """Workers that together hold the pool's weights once."""
        return self.tensor * self.expert


class Resources(Model):
    """What one worker of the pool asks of its machine."""

    cpu: Quantity = Field(default="1", description="Processors, as a Kubernetes quantity.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory, as a Kubernetes quantity; None = no limit; a cluster requests what is known to be needed.",
    )
    gpu: int = Field(
        default=0, ge=0, le=16, description="Cards per worker; 1 = the worker computes on it. More than 1 is refused when served."
    )
    gpu_memory_utilization: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of its card's memory that one worker may fill; None = 0.9. Workers on one card share it: 0.45 for two.",
    )
    gpu_resource: Line = Field(default="nvidia.com/gpu", description="Kubernetes resource name of the accelerator.", max_length=128)


class PoolSpec(Model):
    """One pool: workers of one role."""

    name: str = Field(description="Name of the pool; a DNS label, unique in the document.", min_length=1, max_length=32)
    role: PoolRole = Field(description="What its workers hold and do.")
    replicas: int = Field(default=1, ge=0, le=10_000, description="Number of workers.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How an FFN pool's weights are sharded.")
    threads: int | None = Field(default=None, ge=1, le=1024, description="Compute threads per worker; None = its cpu resource.")
    cores: tuple[Annotated[int, Field(ge=0, le=4095)], ...] | None = Field(
        default=None,
        description="Processors to pin workers to, dealt out in equal runs over the replicas; None = not pinned. Pools that take "
        "turns, such as attention and FFN, may list the same ones, each beginning with its own: the first is where a worker's own "
        "thread runs, the others help while nobody else runs there.",
        max_length=4096,
    )
    resources: Resources = Field(default_factory=Resources, description="What one worker asks of its machine.")
    device: DeviceName = Field(
        default="auto", description="What its workers compute on; auto = cuda where resources.gpu is 1, else cpu."
    )
    node_selector: dict[str, LabelValue] = Field(
        default_factory=dict, description="Labels of the nodes it may run on (Kubernetes).", max_length=64
    )
    env: dict[str, EnvValue] = Field(default_factory=dict, description="Environment variables of its workers.", max_length=256)
    scaling: ScalingSpec = Field(default_factory=ScalingSpec, description="How its size is decided (Kubernetes).")
    tolerations: tuple[TolerationSpec, ...] = Field(
        default=(), description="Taints that its pods tolerate (Kubernetes).", max_length=16
    )

    @field_validator("name")
    @classmethod
    def _is_dns_label(cls, name: str) -> str:
        check_dns_label(name)
        if name in RESERVED_POOL_NAMES:
            raise ValueError(f"{name!r} is reserved")
        return name

    @field_validator("node_selector")
    @classmethod
    def _selects_by_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        check_label_keys(labels)
        return labels

    @field_validator("env")
    @classmethod
    def _names_variables(cls, env: dict[str, str]) -> dict[str, str]:
        check_variables(env)
        return env

    _lists = field_validator("cores", "tolerations", mode="before")(as_tuple)

    @property
    def num_threads(self) -> int:
        """Compute threads per worker, resolved."""
        if self.threads is not None:
            return self.threads
        return max(1, int(parse_quantity(self.resources.cpu)))

    @property
    def worker_device(self) -> Literal["cpu", "cuda"]:
        """What its workers compute on, resolved."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.resources.gpu else "cpu"

    @property
    def floor(self) -> int:
        """Fewest workers it ever has while not asleep or suspended."""
        if self.scaling.mode is ScalingMode.STATIC or self.scaling.min_replicas is None:
            return self.replicas
        return self.scaling.min_replicas

    @property
    def ceiling(self) -> int:
        """Most workers it ever has."""
        if self.scaling.mode is ScalingMode.STATIC or self.scaling.max_replicas is None:
            return self.replicas
        return self.scaling.max_replicas

    @property
    def worker_role(self) -> Role:
        """The role as the data plane's enum."""
        return Role(self.role)

    @model_validator(mode="after")
    def _shards_fit(self) -> PoolSpec:
        found = []
        num_shards = self.parallelism.num_shards
        if self.role != "ffn" and num_shards != 1:
            found.append(("parallelism", f"only ffn pools are sharded, this pool's role is {self.role}"))
        else:
            why = f"is not a multiple of the {num_shards} shards of parallelism; each copy of the weights has a worker per shard"
            for path, size in (
                ("replicas", self.replicas),
                ("scaling.minReplicas", self.scaling.min_replicas),
                ("scaling.maxReplicas", self.scaling.max_replicas),
            ):
                if size is not None and size % num_shards:
                    found.append((path, f"{size} {why}"))
        if self.cores is not None and self.replicas and len(self.cores) % self.replicas:
            found.append(("cores", f"{len(self.cores)} processors can't be dealt equally to {self.replicas} replicas"))
        if found:
            raise FieldsError(found)
        return self


class ServingPoolSpec(Model):
    """Which pool it is, and the size asked for."""

    deployment: Line = Field(description="Name of the LLMDeployment it belongs to.", min_length=1, max_length=40)
    pool: Line = Field(description="Name of the pool within it.", min_length=1, max_length=32)
    role: PoolRole = Field(description="What the pool's workers hold and do.")
    mode: ScalingMode = Field(description="Who decides the size.", strict=False)
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="Workers asked for; kubectl scale and autoscalers write it when mode is External.",
    )
    min_replicas: int = Field(default=1, ge=0, le=10_000, description="Fewest workers accepted.")
    max_replicas: int = Field(default=1, ge=0, le=10_000, description="Most workers accepted.")


class ServingPool(Model):
    """The whole object, without its status."""

    api_version: Literal["serving.antiphon.dev/v1alpha1"] = Field(description="Group and version of the kind.")
    kind: Literal["ServingPool"] = Field(description="The kind.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.", strict=False)
    spec: ServingPoolSpec = Field(description="Which pool it is, and the size asked for.")
