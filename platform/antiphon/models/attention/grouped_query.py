"""Grouped-query attention of one layer (arXiv 2305.13245) and its low-rank relative MFA (arXiv 2412.19255) (hot).

Legend: T rows, D hidden, N query heads, K KV heads, H head dim. Must not know: families, the residual stream.
"""

from __future__ import annotations

import torch

from antiphon.core.errors import UnsupportedModel
from antiphon.device.device import is_card
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, Shaping, attend_rows, paged_attention
from antiphon.models.cards import kernels
from antiphon.models.config import AttentionConfig, LayerConfig, NormKind
from antiphon.models.layers.functional import Norm, RMSNorm, Rope, read_norm
from antiphon.models.layers.linear import Linear
from antiphon.models.layers.quantized import join_linear
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available

_TILE_DIMS = 32  # our matrix kernels read whole runs of this many dimensions of a head


class GroupedAttention:
    """q, k and v in one projection, rotation, paged attention, output projection."""

    def __init__(
        self, config: AttentionConfig, weights: Weights, layer: LayerConfig, rope: Rope, norm: NormKind, eps: float
    ) -> None:
        self._config = config
        self._rope = rope
        names, prefix = layer.names, layer.prefix + layer.names.attention
        parts = [prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"]
        bias: torch.Tensor | None = None
        self._gate: Linear | None = None
        if config.has_output_gate:
            q, gate = _halves_of_heads(weights.read(parts[0] + ".weight"), config.head_dim)
            gate_bias = None
            if config.qkv_bias:
                q_bias, gate_bias = _halves_of_heads(weights.read(parts[0] + ".bias"), config.head_dim)
                bias = torch.cat([q_bias, *(weights.read(part + ".bias") for part in parts[1:])])
            self._gate = Linear(gate, gate_bias)
            self._qkv = join_linear([q, *(weights.read(part + ".weight") for part in parts[1:])], bias)
        else:
            bias = torch.cat([weights.read(part + ".bias") for part in parts]) if config.qkv_bias else None
            self._qkv = join_linear([weights.part(part + ".weight") for part in parts], bias)
        out_name = prefix + names.attention_out
        out_bias = weights.read(out_name + ".bias") if config.output_bias else None
        self._out = join_linear([weights.part(out_name + ".weight")], out_bias)
        self._qkv_tiles, self._out_tiles = (each.tiles if isinstance(each, Linear) else None for each in (self._qkv, self._out))
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._widths = [q_width if config.q_rank is None else config.q_rank, kv_width, kv_width]
        self._q_norm: Norm | None = None
        self._k_norm: Norm | None = None
        if config.qk_norm != "none":
            self._q_norm = read_norm(norm, weights, prefix + names.q_norm, eps)
            self._k_norm = read_norm(norm, weights, prefix + names.k_norm, eps)
        self._rank_norm: Norm | None = None
        self._expand: Linear | None = None
        if config.q_rank is not None:
            self._rank_norm = read_norm(norm, weights, prefix + names.q_rank_norm, eps)
            self._expand = Linear(weights.read(prefix + names.q_expand + ".weight"))
        self._eps = eps
        self._head_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if isinstance(self._q_norm, RMSNorm) and isinstance(self._k_norm, RMSNorm):
            self._head_norms = (self._q_norm.weight_D, self._k_norm.weight_D)
        rotates_whole_rows = (
            config.q_rank is None
            and config.qkv_clip is None
            and config.qk_norm in ("none", "head")
            and (config.qk_norm == "none") == (self._head_norms[0] is None)
        )
        self._head_gate = Linear(weights.read(prefix + names.head_gate + ".weight")) if config.has_head_gate else None
        self._sinks_N = weights.read(prefix + names.sinks, dtype=torch.float32) if config.has_sinks else None
        self._shaping: Shaping | None = None
        if config.softcap is not None or self._sinks_N is not None:
            if is_card(weights.device):
                raise UnsupportedModel("attention with bounded scores or sinks is not computed on a card yet", "softcap")
            self._shaping = Shaping(softcap=config.softcap, sinks_N=self._sinks_N)
        self._native = (
            available()
            and weights.device.type == "cpu"
            and rotates_whole_rows
            and all(w is None or w.dtype in (weights.dtype, torch.float32) for w in self._head_norms)
        )
        self._card = kernels() if rotates_whole_rows and is_card(weights.device) else None
        # The matrix units' attention does not shape scores, and norms heads in bfloat16: others take the decode kernel and, for
        # chunks, torch.
        self._tiles = (
            self._native
            and self._qkv_tiles is not None
            and config.head_dim % _TILE_DIMS == 0
            and self._shaping is None
            and all(w is None or w.dtype is weights.dtype for w in self._head_norms)
        )

    @property
    def first_weight(self) -> torch.Tensor | None:
        """What ``half`` reads first, as our matrix kernels take it; None where they don't serve it."""
        return self._qkv_tiles

    @property
    def joins_norms(self) -> bool:
        """Whether ``half`` can be called."""
        return self._tiles and self._out_tiles is not None and self._head_gate is None and self._gate is None

    def half(
        self, x_TD: torch.Tensor, batch: AttentionBatch, layer: int, cache: KVCache, input_norm: RMSNorm, ffn_norm: RMSNorm
    ) -> torch.Tensor:
        """The attention half in one call, ffn_norm(x += attention(input_norm(x))), newly allocated; both norms in bfloat16."""
        c = self._config
        k_cache, v_cache = cache.planes[layer]
        rows: torch.Tensor = torch.ops.antiphon.attention_half(
            *(x_TD, input_norm.weight_D, self._qkv_tiles, self._qkv.bias, self._rope.cos, self._rope.sin),
            *(batch.positions_T, batch.slots_T, k_cache, v_cache, batch.decode_blocks_BM, batch.decode_lens_B),
            *(batch.block_size_tokens, batch.chunk_slots, batch.chunk_rows, c.num_heads, c.scale, c.sliding_window or 0),
            *(*self._head_norms, self._out_tiles, self._out.bias, ffn_norm.weight_D, self._eps),
        )
        return rows

    def __call__(
        self, x_TD: torch.Tensor, batch: AttentionBatch, tables: tuple[torch.Tensor, torch.Tensor], layer: int, cache: KVCache
    ) -> torch.Tensor:
        """[T, D], newly allocated; the rows' K and V are in the cache afterwards."""
        if self._native:
            return self._attend_natively(x_TD, batch, layer, cache)
        c = self._config
        num_rows = x_TD.shape[0]
        if self._card is not None:
            qkv = self._qkv(x_TD)
            k_cache, v_cache = cache.planes[layer]
            self._card.rope_and_cache(
                *(qkv, self._rope.cos, self._rope.sin, batch.positions_T, batch.slots_T, k_cache, v_cache),
                *(c.num_heads, *self._head_norms, self._eps),
            )
            q_TNH = qkv.narrow(1, 0, c.num_heads * c.head_dim).view(num_rows, c.num_heads, c.head_dim)
            out_TNH = paged_attention(q_TNH, k_cache, v_cache, batch, c.scale, c.sliding_window)
            return self._project(out_TNH.reshape(num_rows, c.num_heads * c.head_dim), x_TD)
        q, k, v = torch.split_with_sizes(self._qkv(x_TD), self._widths, dim=1)
        if self._rank_norm is not None and self._expand is not None:
            q = self._expand(self._rank_norm(q))
        if c.qk_norm == "whole" and self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        if c.qkv_clip is not None:
            q, k, v = (each.clamp(-c.qkv_clip, c.qkv_clip) for each in (q, k, v))
        q_TNH = q.view(num_rows, c.num_heads, c.head_dim)
        k_TKH = k.view(num_rows, c.num_kv_heads, c.head_dim)
        v_TKH = v.view(num_rows, c.num_kv_heads, c.head_dim)
        if c.qk_norm == "head" and self._q_norm is not None and self._k_norm is not None:
            q_TNH, k_TKH = self._q_norm(q_TNH), self._k_norm(k_TKH)
        q_TNH = self._rope.rotate(q_TNH, tables)
        k_TKH = self._rope.rotate(k_TKH, tables)
        cache.write(layer, batch.slots_T, (k_TKH, v_TKH))
        return self._project(self._attend(q_TNH.flatten(1), batch, layer, cache), x_TD)

    def _attend_natively(self, x_TD: torch.Tensor, batch: AttentionBatch, layer: int, cache: KVCache) -> torch.Tensor:
        """The same by the compiled kernels."""
        c = self._config
        kernels = torch.ops.antiphon
        k_cache, v_cache = cache.planes[layer]
        qkv = self._qkv(x_TD)
        if self._tiles:
            out = kernels.tile_attention(
                *(qkv, self._rope.cos, self._rope.sin, batch.positions_T, batch.slots_T, k_cache, v_cache),
                *(batch.decode_blocks_BM, batch.decode_lens_B, batch.block_size_tokens, batch.chunk_slots, batch.chunk_rows),
                *(c.num_heads, c.scale, c.sliding_window or 0, *self._head_norms, self._eps),
            )
            return self._project(out, x_TD)
        kernels.rope_and_cache(
            *(qkv, self._rope.cos, self._rope.sin, batch.positions_T, batch.slots_T, k_cache, v_cache),
            *(c.num_heads, *self._head_norms, self._eps, 0.0),
        )
        return self._project(self._attend(qkv, batch, layer, cache), x_TD)

    def _attend(self, rows_TW: torch.Tensor, batch: AttentionBatch, layer: int, cache: KVCache) -> torch.Tensor:
        c = self._config
        k_cache, v_cache = cache.planes[layer]
        return attend_rows(rows_TW, c.num_heads, k_cache, v_cache, batch, c.scale, c.sliding_window, self._shaping)

    def _project(self, out_TW: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """The heads' results [T, N*H], each times its gate, through the output projection."""
        if self._head_gate is not None:
            gate_TN = torch.sigmoid(self._head_gate(x_TD))
            out_TW = (out_TW.view(*gate_TN.shape, -1) * gate_TN[..., None]).flatten(1)
        if self._gate is not None:
            out_TW = out_TW * torch.sigmoid(self._gate(x_TD))
        return self._out(out_TW)


def _halves_of_heads(weight: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second ``head_dim`` rows of each head."""
    first, second = weight.view(-1, 2, head_dim, *weight.shape[1:]).unbind(1)
    return first.reshape(-1, *weight.shape[1:]), second.reshape(-1, *weight.shape[1:])
