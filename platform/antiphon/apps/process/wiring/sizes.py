"""How many ubatches and shards a document means, and how large the slots of its links are (control speed).

Must not know: how workers are built, or how peers find each other.
"""

from __future__ import annotations

from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.connectors.afd import layout as afd_link
from antiphon.connectors.kv import handoff as kv
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.ids import FFNShard, Role
from antiphon.device.shared import kind_of
from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.transport.base import LinkLayout

MAX_AUTO_UBATCHES = 4  # links have slots for as many where "auto" chooses step by step; 1 where no FFN worker is remote


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
        memory=_memory(facts, spec),
    )


def _memory(facts: ModelFacts, spec: LLMDeploymentSpec) -> str:
    """A card's, unless the host has to look at ids on their way, or a step can't be computed again after a loss (``afd.ahead``)."""
    _, expert = ffn_parallelism(spec)
    return kind_of(facts.device) if expert == 1 and not facts.kv.has_state else ""


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
