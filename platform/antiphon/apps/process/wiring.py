"""Builds the workers of a deployment from its document and checkpoint, and the layouts of the links between them (control speed).

A monolith, a prefill/decode split and an attention/FFN split are the same parts with other links: roles that hold whole layers get
their FFN half behind a loopback link that runs it inline. Must not know: where processes run, or how peers find each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from antiphon.connectors.afd import layout as afd_link
from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.connectors.afd.ffn_side import FFNSide
from antiphon.connectors.kv import handoff as kv
from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.document.pools import parse_quantity
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.core.kv import KVLayout
from antiphon.device.device import CPU, Device
from antiphon.engine.core import EngineCore, Outbox
from antiphon.engine.limits import SchedulerConfig
from antiphon.engine.scheduler import Scheduler
from antiphon.models.attention.kv_cache import TORCH_DTYPES, KVCache
from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.decoder import AttentionHalves, FFNHalves, kv_layout
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.skipping import ExpertSkipping
from antiphon.models.families import describe
from antiphon.models.layers.quantized import Int8Choice
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.loopback import loopback_pair
from antiphon.transport.waiting import WaitSet
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.kv_roles import KVRole, NoHandOff, ReceivesKV, SendsKV
from antiphon.worker.model_runner import AttentionWorker
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.ubatch_tuning import UbatchTuner

MAX_AUTO_UBATCHES = 4  # links have slots for as many where "auto" chooses step by step; 1 where no FFN worker is remote


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A document's model section, resolved against its checkpoint: what every worker of the deployment agrees on."""

    checkpoint: Checkpoint
    config: DecoderConfig
    dtype: torch.dtype
    activation_dtype: torch.dtype
    return_dtype: torch.dtype
    device: torch.device
    max_model_len: int
    kv: KVLayout
    num_blocks: int
    fingerprint: str
    revision: str
    int8: Int8Choice | None = None  # which FFN weights are held in int8
    placement_file: Path | None = None
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
    config = describe(checkpoint.config)
    dtype = TORCH_DTYPES[_dtype_name(spec, checkpoint)]
    max_model_len = spec.model.max_model_len if spec.model.max_model_len is not None else config.max_position
    if max_model_len > config.max_position:
        raise InvalidInput(f"maxModelLen {max_model_len} is more than the model's {config.max_position}", "spec.model.maxModelLen")
    layout = kv_layout(config, dtype, spec.cache.block_size_tokens)
    num_blocks = spec.cache.num_blocks
    if num_blocks is None:
        num_blocks = int(parse_quantity(spec.cache.memory)) // layout.block_bytes
    if num_blocks * layout.block_size_tokens < max_model_len:
        if spec.model.max_model_len is not None:
            raise InvalidInput(
                f"{num_blocks} blocks hold {num_blocks * layout.block_size_tokens} tokens, maxModelLen is {max_model_len}",
                "spec.cache",
            )
        max_model_len = num_blocks * layout.block_size_tokens
    int8 = Int8Choice(shared="shared" not in spec.experts.keep, down="down" not in spec.experts.keep)
    quantized = int8 if spec.model.quantization == "int8" else None
    digest = blake2b(f"{checkpoint.digest}/{config.fingerprint}/{dtype}/{quantized}".encode(), digest_size=8).hexdigest()
    return ModelFacts(
        checkpoint=checkpoint,
        config=config,
        dtype=dtype,
        activation_dtype=_wire_dtype(spec.transport.activation_dtype, dtype),
        return_dtype=_wire_dtype(spec.transport.return_dtype, dtype),
        device=device.torch,
        max_model_len=max_model_len,
        kv=layout,
        num_blocks=num_blocks,
        fingerprint=digest,
        revision=revision,
        int8=quantized,
        batch_wait_s=spec.transport.batch_wait_us * 1e-6,
        placement_file=None if spec.experts.placement_file is None else Path(spec.experts.placement_file),
    )


def num_ubatches(spec: LLMDeploymentSpec, role: Role) -> int:
    """Ubatches in flight at most for an attention-side worker."""
    if spec.transport.num_ubatches != "auto":
        return spec.transport.num_ubatches
    if spec.shared_cores:  # sides that take turns on the same processors hide nothing from each other, and weights are read once
        return 1
    return MAX_AUTO_UBATCHES if role is Role.ATTENTION else 1


def ffn_parallelism(spec: LLMDeploymentSpec) -> tuple[int, int]:
    """(tensor, expert) shards of the document's FFN pools; (1, 1) where there is none."""
    for pool in spec.pools:
        if pool.role == "ffn":
            return pool.parallelism.tensor, pool.parallelism.expert
    return 1, 1


def afd_layout(facts: ModelFacts, spec: LLMDeploymentSpec, shard: FFNShard, *, attention_end: bool, ubatches: int) -> LinkLayout:
    """Layout of a link between an attention worker and the FFN worker of ``shard``, seen from one end."""
    max_rows = spec.scheduler.max_num_batched_tokens
    num_ids = max(count or 0 for count in experts_per_row(facts.config))
    rows_out = afd_link.rows_out_bytes(max_rows, facts.config.hidden_size, facts.activation_dtype, num_ids)
    rows_back = max_rows * facts.config.hidden_size * facts.return_dtype.itemsize
    return LinkLayout(
        channel=afd_link.CHANNEL,
        num_slots=ubatches * facts.config.num_streams + 1,
        send_slot_bytes=rows_out if attention_end else rows_back,
        recv_slot_bytes=rows_back if attention_end else rows_out,
        fields=tuple(
            afd_link.afd_fields(
                revision=facts.revision,
                model_fingerprint=facts.fingerprint,
                shard=shard.index,
                num_shards=shard.num_shards,
                hidden_size=facts.config.hidden_size,
                dtype=facts.activation_dtype,
                return_dtype=facts.return_dtype,
            )
        ),
    )


def kv_link_layout(facts: ModelFacts, *, decode_end: bool) -> LinkLayout:
    """Layout of a link between a decode worker and a prefill worker, seen from one end."""
    ask, answer = kv.request_slot_bytes(facts.max_model_len), kv.kv_slot_bytes(facts.kv)
    return LinkLayout(
        channel=kv.CHANNEL,
        num_slots=kv.NUM_SLOTS,
        send_slot_bytes=ask if decode_end else answer,
        recv_slot_bytes=answer if decode_end else ask,
        fields=tuple(kv.kv_fields(revision=facts.revision, model_fingerprint=facts.fingerprint, layout=facts.kv)),
    )


def experts_per_row(config: DecoderConfig) -> list[int | None]:
    """Expert ids that travel with a row, by the layer number on the wire; 0 for a dense FFN, None where there is none."""
    return [None if ffn is None else ffn.experts_per_row if isinstance(ffn, MoEConfig) else 0 for ffn in config.ffns]


def build_ffn(facts: ModelFacts, shard: FFNShard, epoch: Epoch) -> FFNWorker:
    """An FFN worker without peers."""
    halves = FFNHalves(
        facts.config, facts.checkpoint, facts.dtype, facts.device, shard, facts.placement(shard.num_expert), facts.int8
    )
    side = FFNSide(
        epoch=epoch,
        hidden_size=facts.config.hidden_size,
        dtype=facts.activation_dtype,
        return_dtype=facts.return_dtype,
        compute_dtype=facts.dtype,
        experts_per_row=experts_per_row(facts.config),
    )
    return FFNWorker(halves, side, max_batch_wait_s=facts.batch_wait_s)


@dataclass(slots=True, kw_only=True)
class AttentionPart:
    """An engine with everything around it that its process owns."""

    engine: EngineCore
    worker: AttentionWorker
    ffn: FFNWorker | None  # the inline half of roles that hold whole layers
    decode_side: DecodeSide | None = None  # of roles that decode, where a pool prefills for them
    prefill_side: PrefillSide | None = None  # of the prefill role

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Checkpoint tensors that this worker holds, with their bytes."""
        held = dict(self.worker.halves.resident_bytes)
        if self.ffn is not None:
            held |= self.ffn.halves.resident_bytes
        return held

    @property
    def kv_waiting(self) -> WaitSet:
        """What a loop that waits for hand-offs sleeps on."""
        side = self.decode_side if self.prefill_side is None else self.prefill_side
        return WaitSet() if side is None else side.waiting

    @property
    def num_peers(self) -> int:
        """Workers linked now: those that FFN work or prefills are asked of, or those that ask for prefills."""
        if self.prefill_side is not None:
            return self.prefill_side.num_peers
        num_prefill = 0 if self.decode_side is None else len(self.decode_side.peers())
        return len(self.worker.afd.peers()) + num_prefill

    def close(self) -> None:
        """Close links; idempotent."""
        self.worker.close()
        if self.ffn is not None:
            self.ffn.side.close()


def build_attention(
    facts: ModelFacts,
    spec: LLMDeploymentSpec,
    role: Role,
    worker_id: WorkerId,
    epoch: Epoch,
    outbox: Outbox,
    clock: Callable[[], float],
    *,
    index: int = 0,
    hold_s: float | None = None,
) -> AttentionPart:
    """An engine of any role but FFN. Whole-layer roles are complete; an attention worker still needs links to FFN workers."""
    ubatches = num_ubatches(spec, role)
    tensor, expert = ffn_parallelism(spec) if role is Role.ATTENTION else (1, 1)
    cache = KVCache(facts.kv, facts.num_blocks, facts.device)
    side = AttentionSide(
        epoch=epoch,
        num_shards=tensor * expert,
        num_ubatches=ubatches * facts.config.num_streams,
        hidden_size=facts.config.hidden_size,
        dtype=facts.activation_dtype,
        return_dtype=facts.return_dtype,
        answer_timeout_s=spec.transport.peer_timeout_s,
        hold_s=spec.transport.peer_timeout_s if hold_s is None else hold_s,
        preferred_replica=index,
        experts=ExpertMap(facts.config, facts.placement(expert)),
    )
    ffn = None
    if role.holds_ffn:
        ffn = build_ffn(facts, FFNShard(), epoch)
        near, far = loopback_pair(
            Hello(
                worker_id=worker_id, epoch=epoch, layout=afd_layout(facts, spec, FFNShard(), attention_end=True, ubatches=ubatches)
            ),
            Hello(
                worker_id=worker_id, epoch=epoch, layout=afd_layout(facts, spec, FFNShard(), attention_end=False, ubatches=ubatches)
            ),
            facts.device,
        )
        near.on_poll = _pumped(ffn)
        side.add_link(0, near)
        ffn.side.add_link(far)
    kv_role: KVRole = NoHandOff()
    decode_side, prefill_side = None, None
    if role is Role.PREFILL:
        prefill_side = PrefillSide(epoch=epoch, cache=cache)
        kv_role = SendsKV(prefill_side, cache, facts.config)
    elif any(pool.role == "prefill" for pool in spec.pools):
        decode_side = DecodeSide(epoch=epoch, cache=cache)
        kv_role = ReceivesKV(decode_side)
    halves = AttentionHalves(facts.config, facts.checkpoint, facts.dtype, facts.device, facts.max_model_len)
    if spec.experts.skip_file is not None:
        halves.skip(ExpertSkipping.load(Path(spec.experts.skip_file), facts.config))
    tuner = UbatchTuner(ubatches) if spec.transport.num_ubatches == "auto" and ubatches > 1 else None
    worker = AttentionWorker(
        halves,
        cache,
        side,
        num_ubatches=ubatches,
        tuner=tuner,
        kv=kv_role,
        warms=not role.holds_ffn,
        enforcer=Enforcer(facts.checkpoint.path, facts.config.vocab_size) if role.generates else None,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=spec.scheduler.max_num_seqs,
            max_num_batched_tokens=spec.scheduler.max_num_batched_tokens,
            max_queued_requests=spec.scheduler.max_queued_requests,
            max_model_len=facts.max_model_len,
            block_size_tokens=facts.kv.block_size_tokens,
            num_blocks=facts.num_blocks,
            prefix_caching=spec.cache.prefix_caching,
            remote_prefill_min_tokens=spec.scheduler.remote_prefill_min_tokens,
            kv_lease_s=spec.scheduler.kv_lease_s,
            vocab_size=facts.config.vocab_size,
        ),
        clock,
    )
    return AttentionPart(
        engine=EngineCore(scheduler, worker, outbox), worker=worker, ffn=ffn, decode_side=decode_side, prefill_side=prefill_side
    )


def _pumped(ffn: FFNWorker) -> Callable[[], None]:
    def pump() -> None:
        ffn.pump()

    return pump


def _dtype_name(spec: LLMDeploymentSpec, checkpoint: Checkpoint) -> str:
    if spec.model.dtype != "auto":
        return spec.model.dtype
    name = str(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "float32").removeprefix("torch.")
    return "float32" if name == "float32" else "bfloat16"  # float16 checkpoints run in bfloat16: CPUs have no fp16 units


def _wire_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    if name == "auto":
        return compute
    return torch.int8 if name == "int8" else TORCH_DTYPES[name]
