"""The two halves of a decoder (hot), each built from only its own tensors of a checkpoint.

    attention half of layer i:  rows = ffn_norm(x += out_norm(attention(input_norm(x))))      -> A2F, with the gate's choices
    FFN half of layer i:        f = down(act(gate(rows)) * up(rows)), or the chosen experts'   -> F2A (partial sums)
    next attention half:        x += ffn_out_norm(f)

Rows of a shortcut leave on a stream of their own and join one layer later.
Legend: T rows, D hidden, V vocabulary, K ids per row. Must not know: links, shards other than its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from antiphon.core.ids import FFNShard
from antiphon.device.device import is_card
from antiphon.models.attention.delta import DeltaAttention
from antiphon.models.attention.grouped_query import GroupedAttention
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.latent import LatentAttention
from antiphon.models.attention.paged import AttentionBatch
from antiphon.models.attention.short_conv import ShortConv
from antiphon.models.config import (
    AttentionConfig,
    DecoderConfig,
    DeltaConfig,
    LatentAttentionConfig,
    LayerConfig,
    MoEConfig,
    NormPlace,
    ShortConvConfig,
)
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.routing import Router, Routing
from antiphon.models.experts.shard import DenseFFN, ExpertBank
from antiphon.models.experts.skipping import ExpertSkipping
from antiphon.models.head import LMHead
from antiphon.models.layers.functional import Norm, RMSNorm, Rope, advance, read_norm
from antiphon.models.layers.linear import Linear
from antiphon.models.layers.quantized import Int8Choice
from antiphon.models.layers.rope_config import RopeConfig
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """Rows that leave for the FFN side. They must not change until their result is combined."""

    ffn: int  # the layer number on the wire: DecoderConfig.ffns
    stream: int
    rows_TD: torch.Tensor
    routing: Routing | None  # None: a dense FFN


@dataclass(slots=True, kw_only=True)
class StepState:
    """What the attention halves share within one ubatch of one step: the residual stream and the rotary tables."""

    x_TD: torch.Tensor
    batch: AttentionBatch
    rope_tables: Sequence[tuple[torch.Tensor, torch.Tensor]]  # by distinct rotation
    away: list[Outgoing | None] = field(default_factory=lambda: [None, None])  # by stream
    bad_rows: dict[int, str] = field(default_factory=dict)  # row -> the first gate that found it not to be numbers
    unseen: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # gates of a card, and what they say of each row, bool [T]

    def settle(self) -> None:
        """The step is over: take up what a card's gates say of rows, with one question to it."""
        if self.unseen:
            for (where, _), bad_T in zip(self.unseen, torch.stack([bad_T for _, bad_T in self.unseen]).tolist(), strict=True):
                for row in (row for row, is_bad in enumerate(bad_T) if is_bad):
                    self.bad_rows.setdefault(row, where)
            self.unseen.clear()


Attention = GroupedAttention | LatentAttention | DeltaAttention | ShortConv


@dataclass(slots=True, kw_only=True)
class _AttentionLayer:
    """The attention half of one layer; norms that the layer has not are None."""

    attention: Attention
    rope: int | None  # index of its rotation
    norms: Mapping[NormPlace, Norm]
    router: Router | None
    shortcut: Router | None
    joins_shortcut: bool
    joined: tuple[RMSNorm, RMSNorm] | None  # norms before and after where attention takes them into its own call


class AttentionHalves:
    """Embedding, the attention half of every layer, norms, gates and the LM head. Holds no FFN weight."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        *,
        beside: AttentionHalves | None = None,
    ) -> None:
        """``beside``: of the same checkpoint; its embedding is used, and its LM head where that has the same name."""
        self.config, self.max_model_len = config, max_model_len
        self.dtype, self.device = dtype, device
        weights = Weights(checkpoint, dtype, device)
        names = config.names
        self._embed_VD: torch.Tensor = weights.read(names.embed) if beside is None else beside._embed_VD
        # Rounded to the compute format first, as the models that scale their embeddings were trained.
        self._embed_scale = None if config.embed_scale is None else torch.tensor(config.embed_scale, dtype=dtype, device=device)
        kinds = list(dict.fromkeys(layer.attention.rope for layer in config.layers if layer.attention.rope is not None))
        self._ropes = [Rope(kind, max_model_len, dtype, device) for kind in kinds]
        self._layers = [self._layer(i, layer, weights, kinds) for i, layer in enumerate(config.layers)]
        self._on_card = is_card(device)
        self._needs_no_tables = all(half.joined is not None for half in self._layers)
        norm = read_norm(config.norm, weights, names.final_norm, config.norm_eps)
        if beside is not None and beside.config.names.lm_head == names.lm_head:
            linear = beside.head.linear
        else:
            linear = Linear(
                self._embed_VD if config.tie_embeddings else weights.read(names.lm_head + ".weight"),
                weights.read(names.lm_head + ".bias") if config.lm_head_bias else None,
            )
        self.head: LMHead = LMHead(norm, linear, config.logit_softcap)
        weights.rest()
        self.resident_bytes = weights.resident_bytes

    def _layer(self, index: int, layer: LayerConfig, weights: Weights, kinds: Sequence[RopeConfig]) -> _AttentionLayer:
        config, names = self.config, layer.names
        rope = None if layer.attention.rope is None else kinds.index(layer.attention.rope)
        norm_names: dict[NormPlace, str] = {
            "input": names.input_norm,
            "attention_out": names.attention_out_norm,
            "ffn": names.ffn_norm,
            "ffn_out": names.ffn_out_norm,
        }
        attention: Attention
        match layer.attention:
            case AttentionConfig() as grouped:
                ropes = self._ropes[kinds.index(grouped.rope)]
                attention = GroupedAttention(grouped, weights, layer, ropes, config.norm, config.norm_eps)
            case LatentAttentionConfig() as latent:
                attention = LatentAttention(latent, weights, layer, self._ropes[kinds.index(latent.rope)])
            case DeltaConfig() as delta:
                attention = DeltaAttention(delta, weights, layer)
            case ShortConvConfig() as conv:
                attention = ShortConv(conv, weights, layer)
        norms = {
            place: read_norm(config.norm, weights, layer.prefix + name, config.norm_eps)
            for place, name in norm_names.items()
            if place in layer.norms
        }
        return _AttentionLayer(
            attention=attention,
            rope=rope,
            norms=norms,
            joined=_joined(attention, norms),
            router=Router(layer.ffn, weights, layer) if isinstance(layer.ffn, MoEConfig) else None,
            shortcut=None if layer.shortcut is None else Router(layer.shortcut, weights, layer),
            joins_shortcut=index > 0 and config.layers[index - 1].shortcut is not None,
        )

    def leading(self, num_layers: int) -> AttentionHalves:
        """The first layers of these under the same head; every weight is shared."""
        cut = copy(self)
        cut.config = replace(self.config, layers=self.config.layers[:num_layers])
        cut._layers = self._layers[:num_layers]
        return cut

    @property
    def reads_context_slots(self) -> bool:
        """Whether a layer reads the slots of prefill chunks one by one, on a card too."""
        return any(isinstance(half.attention, LatentAttention) for half in self._layers)

    @property
    def first_weights(self) -> list[torch.Tensor | None]:
        """What each layer's half reads first."""
        attentions = [half.attention for half in self._layers]
        return [each.first_weight if isinstance(each, GroupedAttention) else None for each in attentions]

    def skip(self, skipping: ExpertSkipping | None) -> None:
        """Skip experts from now on, or (None) no longer; the loop's owner calls it between two steps."""
        for number, router in self.routers.items():
            router.skip_below = 0.0 if skipping is None else skipping.bound(number)

    @property
    def routers(self) -> Mapping[int, Router]:
        """Gates by the layer number on the wire."""
        num_layers = self.config.num_layers
        found = {i: half.router for i, half in enumerate(self._layers)}
        found |= {num_layers + i: half.shortcut for i, half in enumerate(self._layers)}
        return {number: router for number, router in found.items() if router is not None}

    @property
    def skipped_share(self) -> float:
        """Share of the experts chosen by rows that was skipped, since start; 0 while nothing is."""
        num_chosen = sum(router.num_chosen for router in self.routers.values())
        return sum(router.num_skipped for router in self.routers.values()) / num_chosen if num_chosen else 0.0

    def begin(self, token_ids_T: torch.Tensor, batch: AttentionBatch) -> StepState:
        """Embed the rows of one ubatch."""
        x_TD = F.embedding(token_ids_T, self._embed_VD)
        if self._embed_scale is not None:
            x_TD.mul_(self._embed_scale)
        tables = [] if self._needs_no_tables else [rope.tables(batch.positions_T) for rope in self._ropes]
        return StepState(x_TD=x_TD, batch=batch, rope_tables=tables)

    def attend(self, layer: int, state: StepState, cache: KVCache) -> Sequence[Outgoing]:
        """The attention half; advances the residual stream and returns the rows for the FFN side."""
        half = self._layers[layer]
        if half.joined is not None and isinstance(half.attention, GroupedAttention):
            rows_TD = half.attention.half(state.x_TD, state.batch, layer, cache, *half.joined)
        else:
            rows_TD = self._attend_in_parts(layer, half, state, cache)
        leaving = [self._leave(layer, layer, 0, rows_TD, half.router, state)]
        if half.shortcut is not None:
            leaving.append(self._leave(layer, self.config.num_layers + layer, 1, rows_TD, half.shortcut, state))
        return leaving

    @staticmethod
    def _attend_in_parts(layer: int, half: _AttentionLayer, state: StepState, cache: KVCache) -> torch.Tensor:
        normed = _normed(half.norms.get("input"), state.x_TD)
        if isinstance(half.attention, DeltaAttention | ShortConv):
            attended = half.attention(normed, state.batch, layer, cache)
        else:
            assert half.rope is not None
            attended = half.attention(normed, state.batch, state.rope_tables[half.rope], layer, cache)
        attended = _normed(half.norms.get("attention_out"), attended)
        norm = half.norms.get("ffn")
        if isinstance(norm, RMSNorm):
            return norm.after_adding(state.x_TD, attended)
        advance(state.x_TD, attended)
        if norm is not None:
            return norm(state.x_TD)
        return state.x_TD if half.shortcut is None else state.x_TD.clone()  # x itself changes while a shortcut's rows are away

    def _leave(self, layer: int, ffn: int, stream: int, rows_TD: torch.Tensor, router: Router | None, state: StepState) -> Outgoing:
        routing = None if router is None else router(rows_TD)
        if routing is not None:
            for row in routing.bad_rows:
                state.bad_rows.setdefault(row, self._gate_name(layer))
            if routing.bad_T is not None:
                state.unseen.append((self._gate_name(layer), routing.bad_T))
        leaving = state.away[stream] = Outgoing(ffn=ffn, stream=stream, rows_TD=rows_TD, routing=routing)
        return leaving

    def _gate_name(self, layer: int) -> str:
        return f"the gate of {self.config.layers[layer].prefix.rstrip('.')}"

    def streams_due(self, layer: int) -> tuple[int, ...]:
        """Streams whose results ``combine`` of this layer takes, in order."""
        return (0, 1) if self._layers[layer].joins_shortcut else (0,)

    def combine(self, layer: int, state: StepState, results: Sequence[torch.Tensor]) -> None:
        """Add the FFN side's results (one [T, D] per stream due) to the residual stream."""
        norm = self._layers[layer].norms.get("ffn_out")
        for stream, result_TD in zip(self.streams_due(layer), results, strict=True):
            left = state.away[stream]
            assert left is not None  # attend() filled the stream before its rows could be sent
            state.away[stream] = None
            if self._on_card:  # where the FFN side's memory is the host's
                result_TD = result_TD.to(state.x_TD.device)
            if left.routing is not None and left.routing.identity_T is not None:
                result_TD = result_TD + left.rows_TD * left.routing.identity_T[:, None].to(left.rows_TD.dtype)
            advance(state.x_TD, result_TD if norm is None else norm(result_TD.to(state.x_TD.dtype)))

    def hidden(self, x_RD: torch.Tensor) -> torch.Tensor:
        """The model's last hidden states, [R, D], from rows of the residual stream."""
        return self.head.hidden(x_RD)

    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] from rows of the residual stream."""
        return self.head.logits(x_RD)

    def greedy(self, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely token of each row, int64 [R], and its logit, fp32 [R], which is no number where the row is none."""
        return self.head.greedy(x_RD)


def _joined(attention: Attention, norms: Mapping[NormPlace, Norm]) -> tuple[RMSNorm, RMSNorm] | None:
    before, after = norms.get("input"), norms.get("ffn")
    if not isinstance(attention, GroupedAttention) or not attention.joins_norms or "attention_out" in norms:
        return None
    if not isinstance(before, RMSNorm) or not isinstance(after, RMSNorm) or before.eps != after.eps:
        return None
    return (before, after) if before.weight_D.dtype is after.weight_D.dtype is torch.bfloat16 else None


def _normed(norm: Norm | None, x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD if norm is None else norm(x_TD)


class FFNHalves:
    """The FFN half of every layer, one shard of it. Holds no attention weight; stateless between calls."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        shard: FFNShard,
        placement: ExpertPlacement | None = None,
        int8: Int8Choice | None = None,
    ) -> None:
        """``placement``: which expert groups hold which experts, None = contiguous runs of near-equal size; ``int8``: which weights
        are held in int8, None = none.
        """
        self.config = config
        self.dtype = dtype
        self.shard = shard
        weights = Weights(checkpoint, dtype, device)
        self._weights = weights
        if placement is None:
            placement = ExpertPlacement.spread(config, shard.num_expert)
        self.ffns: list[DenseFFN | ExpertBank | None] = []
        for number, ffn in enumerate(config.ffns):
            layer = config.layers[number % config.num_layers]
            if isinstance(ffn, MoEConfig):
                held = placement.held(ffn, number, shard.expert_index)
                self.ffns.append(ExpertBank(ffn, weights, layer, shard, held, int8))
            else:
                self.ffns.append(None if ffn is None else DenseFFN(ffn, weights, layer, shard, int8))
        weights.rest()

    def leading(self, num_layers: int) -> FFNHalves:
        """Those of the first layers; every weight is shared."""
        cut = copy(self)
        cut.config = replace(self.config, layers=self.config.layers[:num_layers])
        cut.ffns = [ffn for number, ffn in enumerate(self.ffns) if number % self.config.num_layers < num_layers]
        return cut

    @property
    def resident_bytes(self) -> Mapping[str, int]:
        """Checkpoint tensors held here, with their bytes."""
        return self._weights.resident_bytes

    @property
    def first_weights(self) -> list[torch.Tensor | None]:
        """What each FFN reads first, by the layer number on the wire; None for experts, whose first is not known."""
        return [ffn.first_weight if isinstance(ffn, DenseFFN) else None for ffn in self.ffns]

    @property
    def banks(self) -> Mapping[int, ExpertBank]:
        """Expert banks by the layer number on the wire."""
        return {number: ffn for number, ffn in enumerate(self.ffns) if isinstance(ffn, ExpertBank)}

    def hold(self, placement: ExpertPlacement, rest: float = 0.0) -> None:
        """Read what ``placement`` wants here beyond what is held; may run on another thread while the loop computes.

        Args:
            placement: The one wanted.
            rest: Pause behind every expert, as a multiple of the time that reading it took.

        Raises:
            CheckpointInvalid: a tensor can't be read.
        """
        for number, bank in self.banks.items():
            for expert in set(placement.held(bank.config, number, self.shard.expert_index)) - bank.held:
                start_s = time.perf_counter()
                bank.hold(expert)
                if rest > 0.0:
                    time.sleep(rest * (time.perf_counter() - start_s))
        self._weights.rest()

    def release(self, placement: ExpertPlacement) -> None:
        """Let go of experts that ``placement`` does not want here; a row that still comes for one brings it back."""
        for number, bank in self.banks.items():
            for expert in bank.held - set(placement.held(bank.config, number, self.shard.expert_index)):
                bank.release(expert)

    def rows_by_expert(self) -> dict[int, list[int]]:
        """Rows each expert has had here since start, by the layer number on the wire; the shared expert's come last."""
        return {number: bank.rows_by_expert.tolist() for number, bank in self.banks.items()}

    def compute(
        self, number: int, rows_TD: torch.Tensor, ids_TK: torch.Tensor | None = None, weights_TK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This shard's partial sum for every row, [T, D]; ids and weights where ``number`` is a mixture of experts."""
        if rows_TD.device != self._weights.device:  # rows that came through host memory
            rows_TD = rows_TD.to(self._weights.device)
        ffn = self.ffns[number]
        if isinstance(ffn, ExpertBank):
            assert ids_TK is not None  # the connector refuses rows without ids for a mixture of experts
            assert weights_TK is not None
            return ffn.compute(rows_TD, ids_TK, weights_TK)
        assert ffn is not None  # and rows for a layer number that has no FFN
        return ffn.compute(rows_TD)
