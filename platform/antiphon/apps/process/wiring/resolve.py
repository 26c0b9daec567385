"""A document's model section, resolved against its checkpoint: what all workers of a deployment agree on (control speed).

Must not know: workers, links.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch

from antiphon.apps.process.wiring.cache_room import CacheRoom, cache_room
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.core.kv import KVLayout
from antiphon.device.device import CPU, Device
from antiphon.device.memory import CardMemory
from antiphon.models.attention.kv_cache import TORCH_DTYPES
from antiphon.models.cache_layout import kv_layout
from antiphon.models.config import DecoderConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.families import describe
from antiphon.models.layers.quantized import Int8Choice
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.pooling.decoders import headless
from antiphon.models.pooling.facts import PoolingFacts, check_topology, read_pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A document's model section, resolved against its checkpoint: what every worker of the deployment agrees on."""

    checkpoint: Checkpoint
    config: DecoderConfig
    dtype: torch.dtype
    activation_dtype: torch.dtype
    return_dtype: torch.dtype
    device: torch.device
    max_model_len: int  # of the deployment until the cache is sized, then of this worker
    kv: KVLayout
    num_blocks: int | None  # None = what the card has left, known once weights are on it
    num_state_slots: int | None  # None = the model has no states, or as above
    fingerprint: str
    revision: str
    int8: Int8Choice | None = None  # which FFN weights are held in int8
    placement_file: Path | None = None
    pooling: PoolingFacts | None = None  # of a model that does not generate
    card_memory: CardMemory | None = None  # of this worker's card
    batch_wait_s: float = 0.0  # rows are held for those of other attention workers at most this long

    def placement(self, num_groups: int) -> ExpertPlacement:
        """Where experts are when serving starts. Raises InvalidInput when the placement file does not fit."""
        if self.placement_file is None or num_groups == 1:
            return ExpertPlacement.spread(self.config, num_groups)
        placement = ExpertPlacement.load(self.placement_file, self.config)
        if placement.num_groups != num_groups:
            raise InvalidInput(
                f"{self.placement_file} has {placement.num_groups} groups of experts, the pools have {num_groups}", "placement"
            )
        return placement


def resolve_model(spec: LLMDeploymentSpec, checkpoint_dir: str, revision: str, device: Device = CPU) -> ModelFacts:
    """Resolve every "auto" of the document. ``device``: the worker's own; everything else is equal for all workers.

    Raises:
        CheckpointInvalid, UnsupportedModel: the checkpoint can't be served.
        InvalidInput: the document asks for more than the model or the cache memory has.
    """
    checkpoint = Checkpoint.open(Path(checkpoint_dir))
    pooling = read_pooling(checkpoint.path, spec.model.task)
    check_topology(spec.topology, pooling)
    config = describe(checkpoint.config) if pooling is None else headless(checkpoint)
    dtype = dtype_of(spec, checkpoint)
    max_model_len = spec.model.max_model_len if spec.model.max_model_len is not None else config.max_position
    if pooling is not None and pooling.max_tokens is not None and spec.model.max_model_len is None:
        max_model_len = min(max_model_len, pooling.max_tokens)
    if max_model_len > config.max_position:
        raise InvalidInput(f"maxModelLen {max_model_len} is more than the model's {config.max_position}", "spec.model.maxModelLen")
    layout = kv_layout(config, dtype, spec.cache.block_size_tokens)
    int8 = Int8Choice(shared="shared" not in spec.experts.keep, down="down" not in spec.experts.keep)
    quantized = int8 if spec.model.quantization == "int8" else None
    digest = blake2b(f"{checkpoint.digest}/{config.fingerprint}/{dtype}/{quantized}".encode(), digest_size=8).hexdigest()
    facts = ModelFacts(
        checkpoint=checkpoint,
        config=config,
        dtype=dtype,
        activation_dtype=_wire_dtype(spec.transport.activation_dtype, dtype),
        return_dtype=_wire_dtype(spec.transport.return_dtype, dtype),
        device=device.torch,
        max_model_len=max_model_len,
        kv=layout,
        num_blocks=None,
        num_state_slots=None,
        fingerprint=digest,
        revision=revision,
        int8=quantized,
        card_memory=device.memory,
        batch_wait_s=spec.transport.batch_wait_us * 1e-6,
        pooling=pooling,
        placement_file=None if spec.experts.placement_file is None else Path(spec.experts.placement_file),
    )
    if device.memory is not None:  # the card says how much there is, once weights are on it
        return facts
    return with_cache(facts, spec, cache_room(spec, layout, max_model_len, spec.cache.host_memory_bytes))


def with_cache(facts: ModelFacts, spec: LLMDeploymentSpec, room: CacheRoom) -> ModelFacts:
    """The facts with the cache's size; ``max_model_len`` is cut to what it holds, where the document does not ask for more.

    Raises:
        InvalidInput: it does.
    """
    num_tokens = room.num_blocks * facts.kv.block_size_tokens
    if num_tokens < facts.max_model_len and spec.model.max_model_len is not None:
        raise InvalidInput(f"{room.num_blocks} blocks hold {num_tokens} tokens, maxModelLen is {facts.max_model_len}", "spec.cache")
    return replace(
        facts,
        num_blocks=room.num_blocks,
        num_state_slots=room.num_state_slots,
        max_model_len=min(facts.max_model_len, num_tokens),
    )


def dtype_of(spec: LLMDeploymentSpec, checkpoint: Checkpoint) -> torch.dtype:
    """The compute format, "auto" resolved."""
    return TORCH_DTYPES[_dtype_name(spec, checkpoint)]


def _dtype_name(spec: LLMDeploymentSpec, checkpoint: Checkpoint) -> str:
    if spec.model.dtype != "auto":
        return spec.model.dtype
    name = str(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "float32").removeprefix("torch.")
    return "float32" if name == "float32" else "bfloat16"  # float16 checkpoints run in bfloat16: CPUs have no fp16 units


def _wire_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    if name == "auto":
        return compute
    return torch.int8 if name == "int8" else TORCH_DTYPES[name]
