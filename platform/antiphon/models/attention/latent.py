"""Multi-head latent attention of one layer (MLA, arXiv 2405.04434 §2.1) over a cache of latents (hot).

Per token and layer the cache holds one latent c and one rotated key r for all heads. Decoding rows are taken into the latent space,
where all heads share K = [c, r] and V = c, so that nothing is expanded per cached token; a prefill chunk expands its context once
and runs ordinary attention, which costs less when rows are many.

    decode:   score = (q_nope W_uk)·c + q_rope·r     out = (Σ p c) W_uv
    prefill:  k = [c W_uk^T, r], v = c W_uv

Legend: T rows, D hidden, N heads, R latent rank, P rotated dims, H not rotated dims of a head, V value dims, C context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from antiphon.core.errors import UnsupportedModel
from antiphon.device.device import is_card
from antiphon.models.attention.indexer import Indexer
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch, Chunk, attend_context, attend_rows, chunk_attention, slot_attention
from antiphon.models.config import LatentAttentionConfig, LayerConfig
from antiphon.models.layers.functional import RMSNorm, Rope
from antiphon.models.layers.linear import Linear, has_tiles
from antiphon.models.loading.weights import Weights

_ROWS = 16  # of a tile


class LatentAttention:
    """Low-rank q, latent k and v, rotation of the last dims of q and of the shared key."""

    def __init__(self, config: LatentAttentionConfig, weights: Weights, layer: LayerConfig, rope: Rope) -> None:
        self._config = c = config
        self._rope = rope
        prefix = layer.prefix + layer.names.attention
        bias = ".bias" if c.bias else None
        self._q_down: Linear | None = None
        self._q_norm: RMSNorm | None = None
        if c.q_rank is None:
            q_up = weights.read(prefix + "q_proj.weight")
        else:
            self._q_down = Linear(
                weights.read(prefix + "q_a_proj.weight"), weights.read(prefix + "q_a_proj" + bias) if bias else None
            )
            self._q_norm = RMSNorm(weights.read(prefix + "q_a_layernorm.weight"), c.norm_eps)
            q_up = weights.read(prefix + "q_b_proj.weight")
        kv_down = weights.read(prefix + "kv_a_proj_with_mqa.weight")
        kv_bias = weights.read(prefix + "kv_a_proj_with_mqa" + bias) if bias else None
        if c.interleaved:
            # Rotating neighbours against each other is rotating halves after a permutation, and q·r does not see one.
            q_up = _halves(q_up.view(c.num_heads, c.nope_dim + c.rope_dim, -1), c.rope_dim).reshape(q_up.shape)
            kv_down = _halves(kv_down[None], c.rope_dim)[0]
            kv_bias = None if kv_bias is None else _halves(kv_bias[None, :, None], c.rope_dim)[0, :, 0]
        self._q_up = Linear(q_up)
        self._scale = c.scale * c.q_factor  # a factor on q is one on the scores
        self._kv_down = Linear(kv_down.contiguous(), kv_bias)
        norm_name = prefix + "kv_a_layernorm.weight"
        norm = weights.read(norm_name) if c.kv_factor == 1.0 else weights.read(norm_name, dtype=torch.float32) * c.kv_factor
        self._kv_norm = RMSNorm(norm, c.norm_eps)
        kv_up = weights.read(prefix + "kv_b_proj.weight")
        self._kv_up = Linear(kv_up)
        heads_NxR = kv_up.view(c.num_heads, c.nope_dim + c.v_dim, c.kv_rank)
        self._k_up_NHR = heads_NxR[:, : c.nope_dim].contiguous()
        self._v_up_NRV = heads_NxR[:, c.nope_dim :].transpose(1, 2).contiguous()
        self._indexer: Indexer | None = None
        if c.index is not None:
            if is_card(weights.device):
                raise UnsupportedModel("sparse attention is not computed on a card yet", "index_topk")
            self._indexer = Indexer(c.index, weights, prefix + "indexer.", rope)
        out_bias = weights.read(prefix + "o_proj" + bias) if bias else None
        self._out = Linear(weights.read(prefix + "o_proj.weight"), out_bias)

    def __call__(
        self, x_TD: torch.Tensor, batch: AttentionBatch, tables: tuple[torch.Tensor, torch.Tensor], layer: int, cache: KVCache
    ) -> torch.Tensor:
        """[T, D], newly allocated; the rows' latents are in the cache afterwards."""
        c = self._config
        num_rows = x_TD.shape[0]
        low = x_TD if self._q_down is None or self._q_norm is None else self._q_norm(self._q_down(x_TD))
        q_TNx = self._q_up(low).view(num_rows, c.num_heads, c.nope_dim + c.rope_dim)
        q_TNH, q_TNP = torch.split_with_sizes(q_TNx, [c.nope_dim, c.rope_dim], dim=2)
        q_TNP = self._rope.rotate(q_TNP, tables)
        latent_TR, r_TP = torch.split_with_sizes(self._kv_down(x_TD), [c.kv_rank, c.rope_dim], dim=1)
        r_T1P = self._rope.rotate(r_TP[:, None], tables)
        written = [torch.cat((self._kv_norm(latent_TR)[:, None], r_T1P), dim=2)]
        if self._indexer is not None:
            written.append(self._indexer.keys(x_TD, tables))
        cache.write(layer, batch.slots_T, written)
        plane = cache.planes[layer][0]
        if self._indexer is not None and _num_seen(batch) > self._indexer.top_k:
            out_TNV = self._attend_sparsely(self._indexer, low, x_TD, q_TNH, q_TNP, batch, tables, cache.planes[layer])
            return self._out(out_TNV.reshape(num_rows, c.num_heads * c.v_dim))
        parts = []
        if batch.num_decodes:
            parts.append(self._decode(q_TNH[: batch.num_decodes], q_TNP[: batch.num_decodes], plane, batch))
        for chunk in batch.chunks:  # on a card, too: there are few, and their keys are expanded by a product each
            end = chunk.first_row + chunk.num_rows
            q_CNx = torch.cat((q_TNH[chunk.first_row : end], q_TNP[chunk.first_row : end]), dim=2)
            parts.append(self._prefill(q_CNx, plane, chunk))
        out_TNV = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._out(out_TNV.reshape(num_rows, c.num_heads * c.v_dim))

    def _attend_sparsely(
        self,
        indexer: Indexer,
        low_TQ: torch.Tensor,
        x_TD: torch.Tensor,
        q_TNH: torch.Tensor,
        q_TNP: torch.Tensor,
        batch: AttentionBatch,
        tables: tuple[torch.Tensor, torch.Tensor],
        planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Rows see what the indexer chooses of their contexts: decodes read no other latent, chunks mask the others. [T, N, V]."""
        plane, keys = planes
        index_q_TNH, index_w_TN = indexer.queries(low_TQ, x_TD, tables)
        parts, num_decodes = [], batch.num_decodes
        slots_BC, lens_B = batch.decode_slots_BC, batch.decode_lens_B
        if slots_BC is not None and lens_B is not None:
            seen_BC = torch.arange(slots_BC.shape[1]) < lens_B[:, None]
            chosen_BC = indexer.choose(index_q_TNH[:num_decodes], index_w_TN[:num_decodes], keys, slots_BC, seen_BC)
            order_BK = torch.argsort((~chosen_BC).to(torch.uint8), dim=1, stable=True)[:, : indexer.top_k]
            q_BNx = self._in_latent_space(q_TNH[:num_decodes], q_TNP[:num_decodes])
            out_BNR = slot_attention(
                *(q_BNx, plane, plane[..., : self._config.kv_rank], slots_BC.gather(1, order_BK)),
                *(lens_B.clamp(max=indexer.top_k), self._scale),
            )
            parts.append(_by_head(out_BNR, self._v_up_NRV))
        for chunk in batch.chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            columns_C = torch.arange(chunk.context_slots.numel())
            seen_TC = columns_C <= torch.arange(chunk.num_past, columns_C.numel())[:, None]
            chosen_TC = indexer.choose(index_q_TNH[rows], index_w_TN[rows], keys, chunk.context_slots[None], seen_TC)
            parts.append(self._prefill(torch.cat((q_TNH[rows], q_TNP[rows]), dim=2), plane, chunk, chosen_TC))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_latent_space(self, q_BNH: torch.Tensor, q_BNP: torch.Tensor) -> torch.Tensor:
        q_BNR = _by_head(q_BNH, self._k_up_NHR)
        return torch.cat((q_BNR, q_BNP), dim=2)

    def _decode(self, q_BNH: torch.Tensor, q_BNP: torch.Tensor, plane: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        c = self._config
        decodes = (
            batch if not batch.chunks else replace(batch, chunks=(), card=None if batch.card is None else batch.card.decodes())
        )
        q_BNx = self._in_latent_space(q_BNH, q_BNP)
        out_BW = attend_rows(q_BNx.flatten(1), c.num_heads, plane, plane[..., : c.kv_rank], decodes, self._scale, None)
        out_BNR = out_BW.view(-1, c.num_heads, c.kv_rank)
        return _by_head(out_BNR, self._v_up_NRV)

    def _prefill(
        self, q_CNx: torch.Tensor, plane: torch.Tensor, chunk: Chunk, chosen_TC: torch.Tensor | None = None
    ) -> torch.Tensor:
        c = self._config
        cached = plane[chunk.context_slots, 0]
        kv = self._kv_up(cached[:, : c.kv_rank].contiguous()).view(-1, c.num_heads, c.nope_dim + c.v_dim)
        k_up, v = torch.split_with_sizes(kv, [c.nope_dim, c.v_dim], dim=2)
        r = cached[:, None, c.kv_rank :].expand(-1, c.num_heads, -1)
        k_CNx = torch.cat((k_up, r), dim=2)
        if chosen_TC is None:
            return attend_context(q_CNx, k_CNx, v, chunk, self._scale)
        return chunk_attention(q_CNx, k_CNx, v, chunk, self._scale, None, chosen_TC)


def _by_head(x_BNI: torch.Tensor, weight_NIO: torch.Tensor) -> torch.Tensor:
    """Each head's product, [B, N, O].

    oneDNN chooses among its products on matrix units by the number of rows, and they round differently. There it gets the same
    number at a time, so that a row's bits do not depend on those beside it.
    """
    if not has_tiles(weight_NIO):
        return torch.matmul(x_BNI.transpose(0, 1), weight_NIO).transpose(0, 1)
    num_rows = x_BNI.shape[0]
    x_NBI = F.pad(x_BNI, (0, 0, 0, 0, 0, -num_rows % _ROWS)).transpose(0, 1)
    firsts = range(0, x_NBI.shape[1], _ROWS)
    runs = [torch.matmul(x_NBI[:, first : first + _ROWS].contiguous(), weight_NIO) for first in firsts]
    out_NBO = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
    return out_NBO[:, :num_rows].transpose(0, 1)


def _num_seen(batch: AttentionBatch) -> int:
    """The longest context of a row."""
    longest = 0 if batch.decode_slots_BC is None else batch.decode_slots_BC.shape[1]
    return max([longest, *(slots.numel() for slots in batch.chunk_slots)])


def _halves(weight: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """Bring the last ``rope_dim`` rows of dimension 1 from (even, odd, even, ...) order into evens before odds."""
    kept, rotated = weight[:, :-rope_dim], weight[:, -rope_dim:]
    return torch.cat((kept, rotated[:, 0::2], rotated[:, 1::2]), dim=1)
