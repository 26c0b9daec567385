"""Builds the workers of a deployment from its document and resolved model (control speed).

A monolith, a prefill/decode split and an attention/FFN split are the same parts with other links: roles that hold whole layers get
their FFN half behind a loopback link that runs it inline. Must not know: where processes run, or how peers find each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from antiphon.apps.process.wiring.card_room import see_use, sized, within_share
from antiphon.apps.process.wiring.drafters import build_drafter
from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.apps.process.wiring.sizes import afd_layout, experts_per_row, ffn_parallelism, num_ubatches
from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.connectors.afd.ffn_side import FFNSide
from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.device.device import is_card
from antiphon.device.graphs import CudaGraphs, Graphs, TapeGraphs
from antiphon.device.memory import CardMemory
from antiphon.device.stream import CurrentStream
from antiphon.engine.core import EngineCore, Outbox
from antiphon.engine.limits import SchedulerConfig
from antiphon.engine.scheduler import Scheduler
from antiphon.engine.speculation.speculator import Speculator
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.experts.skipping import ExpertSkipping
from antiphon.models.pooling.pooler import Pooler
from antiphon.transport.base import Hello
from antiphon.transport.loopback import loopback_pair
from antiphon.transport.waiting import WaitSet
from antiphon.worker.cards.decode_graphs import DecodeGraphs
from antiphon.worker.cards.ffn_graphs import FFNGraphs
from antiphon.worker.cards.overlap import LaunchedStep
from antiphon.worker.cards.profiling import LargestSteps
from antiphon.worker.cards.split_graphs import SplitGraphs
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.kv_roles import KVRole, NoHandOff, ReceivesKV, SendsKV
from antiphon.worker.model_runner import AttentionWorker
from antiphon.worker.speculation.prediction_drafter import PredictionDrafter
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.ubatches.tuning import UbatchTuner


def build_ffn(facts: ModelFacts, shard: FFNShard, epoch: Epoch, *, replays: bool = True) -> FFNWorker:
    """An FFN worker without peers. ``replays``: on a card its halves are recorded; those that a worker runs inline need not be.

    Raises:
        InvalidInput: its weights do not fit into its share of a card.
    """
    placement = facts.placement(shard.num_expert)
    with within_share(facts.card_memory):
        halves = FFNHalves(facts.config, facts.checkpoint, facts.dtype, facts.device, shard, placement, facts.int8)
    if facts.card_memory is not None:
        facts.card_memory.check_free()
    side = FFNSide(
        epoch=epoch,
        hidden_size=facts.config.hidden_size,
        dtype=facts.activation_dtype,
        return_dtype=facts.return_dtype,
        compute_dtype=facts.dtype,
        experts_per_row=experts_per_row(facts.config),
    )
    graphs = None
    if replays and _wants_graphs(facts):
        graphs = FFNGraphs(halves, _graphs(facts), facts.device, experts_per_row=experts_per_row(facts.config))
        graphs.record()
    return FFNWorker(halves, side, max_batch_wait_s=facts.batch_wait_s, graphs=graphs)


@dataclass(slots=True, kw_only=True)
class AttentionPart:
    """An engine with everything around it that its process owns."""

    facts: ModelFacts  # with the cache's size as it is
    engine: EngineCore[LaunchedStep]
    worker: AttentionWorker
    cache: KVCache
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
    overlaps: bool = True,
) -> AttentionPart:
    """An engine of any role but FFN. Whole-layer roles are complete; an attention worker still needs links to FFN workers.
    ``overlaps``: steps that a card replays are decided while the one before is computed; without, for comparisons.

    Raises:
        InvalidInput: the document asks for more than the worker's share of a card holds; names the field.
    """
    overlaps = overlaps and os.environ.get("ANTIPHON_OVERLAP") != "0"
    ubatches = num_ubatches(spec, role)
    tensor, expert = ffn_parallelism(spec) if role is Role.ATTENTION else (1, 1)
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
        ffn = build_ffn(facts, FFNShard(), epoch, replays=False)
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
    with within_share(facts.card_memory):
        halves = AttentionHalves(facts.config, facts.checkpoint, facts.dtype, facts.device, facts.max_model_len)
        pooler = None if facts.pooling is None else Pooler(facts.pooling, facts.checkpoint, facts.dtype, facts.device)
        speculation, drafter, speculator = spec.speculation, None, None
        if speculation is not None and role.generates:
            drafter = build_drafter(speculation, facts, halves, None if ffn is None else ffn.halves)
            speculator = Speculator(drafter, max_drafts=speculation.max_drafts, clock=clock)
    if spec.experts.skip_file is not None:
        halves.skip(ExpertSkipping.load(Path(spec.experts.skip_file), facts.config))
    replays = _replays(facts, role)
    if facts.card_memory is not None:
        facts = _sized_on_card(facts, spec, facts.card_memory, halves, None if ffn is None else ffn.halves, replays=replays)
        halves.max_model_len = facts.max_model_len  # no context is longer: tables and splits of attention go by it
    assert facts.num_blocks is not None  # resolved with the document, or just now
    cache = KVCache(facts.kv, facts.num_blocks + replays, facts.device, facts.num_state_slots or 0)
    kv_role: KVRole = NoHandOff()
    decode_side, prefill_side = None, None
    if role is Role.PREFILL:
        prefill_side = PrefillSide(epoch=epoch, cache=cache)
        kv_role = SendsKV(prefill_side, cache, facts.config)
    elif any(pool.role == "prefill" for pool in spec.pools):
        decode_side = DecodeSide(epoch=epoch, cache=cache)
        kv_role = ReceivesKV(decode_side)
    graphs = split_graphs = None
    if replays and ffn is not None:
        graphs = DecodeGraphs(
            halves,
            ffn.halves,
            cache,
            _graphs(facts),
            CurrentStream(facts.device),
            max_rows=spec.scheduler.max_num_seqs,
            spare_block=facts.num_blocks,
            return_dtype=facts.return_dtype,
        )
        graphs.record()
    elif replays:
        split_graphs = SplitGraphs(
            halves,
            cache,
            _graphs(facts),
            max_rows=spec.scheduler.max_num_seqs,
            num_lanes=ubatches,
            spare_block=facts.num_blocks,
            return_dtype=facts.return_dtype,
        )
        split_graphs.record()
    tuner = UbatchTuner(ubatches) if spec.transport.num_ubatches == "auto" and ubatches > 1 else None
    worker = AttentionWorker(
        halves,
        cache,
        side,
        num_ubatches=ubatches,
        tuner=tuner,
        kv=kv_role,
        warms=not role.holds_ffn,
        enforcer=Enforcer(facts.checkpoint.path, facts.config.vocab_size) if role.generates and facts.pooling is None else None,
        pooler=pooler,
        hidden_states=drafter if isinstance(drafter, PredictionDrafter) else None,
        graphs=graphs,
        split_graphs=split_graphs,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=spec.scheduler.max_num_seqs,
            max_num_batched_tokens=spec.scheduler.max_num_batched_tokens,
            max_queued_requests=spec.scheduler.max_queued_requests,
            max_model_len=facts.max_model_len,
            block_size_tokens=facts.kv.block_size_tokens,
            num_blocks=facts.num_blocks,
            num_state_slots=facts.num_state_slots,
            snapshot_blocks=spec.cache.snapshot_blocks,
            prefix_caching=spec.cache.prefix_caching,
            remote_prefill_min_tokens=spec.scheduler.remote_prefill_min_tokens,
            kv_lease_s=spec.scheduler.kv_lease_s,
            vocab_size=facts.config.vocab_size,
        ),
        clock,
        speculator,
    )
    return AttentionPart(
        facts=facts,
        engine=EngineCore(scheduler, worker, outbox, worker.overlap if overlaps else None, worker.lanes if overlaps else None),
        worker=worker,
        cache=cache,
        ffn=ffn,
        decode_side=decode_side,
        prefill_side=prefill_side,
    )


def _sized_on_card(
    facts: ModelFacts,
    spec: LLMDeploymentSpec,
    memory: CardMemory,
    halves: AttentionHalves,
    ffn: FFNHalves | None,
    *,
    replays: bool,
) -> ModelFacts:
    """The facts with as many blocks as the card has room for, seen from the largest steps."""
    rows = DecodeGraphs.most_rows(spec.scheduler.max_num_seqs) if replays else 0
    use = see_use(memory, lambda: LargestSteps(halves, ffn, facts.kv), spec, rows, rows * DecodeGraphs.row_bytes(halves, facts.kv))
    return sized(facts, spec, memory, use)


def _replays(facts: ModelFacts, role: Role) -> bool:
    """Whether decode steps are replayed: on a card, by a worker that has nothing but KV to find for a row. What would change on
    the way to FFN workers is not done within a recording of whole layers.
    """
    is_plain = facts.pooling is None and not facts.kv.has_state
    is_same = facts.activation_dtype == facts.dtype and facts.return_dtype is not torch.int8
    return _wants_graphs(facts) and role.generates and is_plain and (is_same or not role.holds_ffn)


def _wants_graphs(facts: ModelFacts) -> bool:
    return is_card(facts.device) and os.environ.get("ANTIPHON_GRAPHS") != "0"  # for comparisons


def _graphs(facts: ModelFacts) -> Graphs:
    return TapeGraphs() if facts.device.type == "cpu" else CudaGraphs(facts.device)


def _pumped(ffn: FFNWorker) -> Callable[[], None]:
    def pump() -> None:
        ffn.pump()

    return pump
