"""Paged attention over the rows of one step, in plain torch: the reference, and the path on machines without our kernel (hot).

Rows are ordered decodes first (one row a request), then prefill chunks. Query heads that share a KV head are grouped as extra
queries: torch's own grouped attention is several times slower on CPUs in bf16.
K and V may differ in head dim, and V may be a view of K's cache (latent attention). Scores that are bounded, or that share their
softmax with a learned logit, are worked out whole, some rows at a time (``Shaping``).
Legend: T rows, N query heads, K KV heads, G = N/K, H head dim, V of values, B decoding requests, C context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from antiphon.device.device import is_card
from antiphon.models.attention.states import StateBatch
from antiphon.models.cards import kernels
from antiphon.models.native.library import available

_ROWS = 256  # of a chunk whose scores are held at once, where they are worked out whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A prefill chunk: rows [first_row, first_row + num_rows) of the step see ``context_slots`` (int64 [C]), causally."""

    first_row: int
    num_rows: int
    context_slots: torch.Tensor

    @property
    def num_past(self) -> int:
        """Context tokens before the chunk's first row."""
        return self.context_slots.numel() - self.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What some models do with scores before and within the softmax."""

    softcap: float | None = None  # scores become c·tanh(score / c) (Gemma 2, arXiv 2408.00118 §2)
    sinks_N: torch.Tensor | None = None  # fp32: a logit per head that takes its share and gives no value (gpt-oss)

    def weights(self, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Softmax of fp32 scores [..., N, rows, C] without what ``hidden`` (broadcast over them) hides; changes the scores."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores.masked_fill_(hidden, float("-inf"))
        if self.sinks_N is None:
            return torch.softmax(scores, dim=-1)
        sinks_N11 = self.sinks_N[:, None, None]
        best = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks_N11)
        scores = scores.sub_(best).exp_()
        return scores.div_(scores.sum(dim=-1, keepdim=True) + torch.exp(sinks_N11 - best))


@dataclass(frozen=True, slots=True, kw_only=True)
class CardTables:
    """What a card's kernels take besides: chunks as numbers that lie on the card, none of them known to the host in a capture."""

    num_parts: int  # that a decode row's context is cut into
    chunk_blocks_CM: torch.Tensor  # int32
    first_rows_C: torch.Tensor  # int64, among the rows behind the decodes
    num_rows_C: torch.Tensor  # int64
    num_past_C: torch.Tensor  # int64: context before the chunk's first row
    max_rows: int  # of a chunk

    def decodes(self) -> CardTables:
        """The same without chunks."""
        return replace(self, max_rows=0)


@dataclass(slots=True, kw_only=True)
class AttentionBatch:
    """Where the rows of one step (or one ubatch of it) stand in the cache. Nobody changes it once it is laid out."""

    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64: where each row's own K and V go
    block_size_tokens: int
    decode_blocks_BM: torch.Tensor | None  # int32 block ids, padded with 0; None = no decodes
    decode_lens_B: torch.Tensor | None  # int64: context lengths, the row itself included
    chunks: Sequence[Chunk]
    states: StateBatch | None = None  # where the model has layers with a state
    card: CardTables | None = None  # on a card; ``chunks`` are there only where something reads their slots
    _decode_slots_BC: torch.Tensor | None = None
    chunk_slots: Sequence[torch.Tensor] = field(init=False)  # context slots by chunk, and rows by chunk: as our kernels take them
    chunk_rows: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.chunk_slots = [chunk.context_slots for chunk in self.chunks]
        self.chunk_rows = [chunk.num_rows for chunk in self.chunks]

    @property
    def decode_slots_BC(self) -> torch.Tensor | None:
        """Context slots of the decodes, int64, padded with those of block 0; worked out when first asked for."""
        if self._decode_slots_BC is None and self.decode_blocks_BM is not None and self.decode_lens_B is not None:
            size = self.block_size_tokens
            slots = self.decode_blocks_BM.long()[:, :, None] * size + torch.arange(size, device=self.slots_T.device)
            self._decode_slots_BC = slots.flatten(1)[:, : int(self.decode_lens_B.max())]
        return self._decode_slots_BC

    @property
    def num_decodes(self) -> int:
        """Leading rows that are decodes."""
        return 0 if self.decode_lens_B is None else self.decode_lens_B.numel()


def paged_attention(
    q_TNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    shaping: Shaping | None = None,
) -> torch.Tensor:
    """Attention of every row over its own context, whose K and V are in the cache already. [T, N, H]."""
    if batch.card is not None:
        return _on_card(q_TNH, k_cache, v_cache, batch, batch.card, scale, sliding_window or 0)
    parts = []
    if batch.decode_slots_BC is not None and batch.decode_lens_B is not None:
        q_BNH = q_TNH[: batch.num_decodes]
        parts.append(_decode(q_BNH, k_cache, v_cache, batch.decode_slots_BC, batch.decode_lens_B, scale, sliding_window, shaping))
    parts += [prefill_attention(q_TNH, k_cache, v_cache, chunk, scale, sliding_window, shaping) for chunk in batch.chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_rows(
    rows_TW: torch.Tensor,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    shaping: Shaping | None = None,
) -> torch.Tensor:
    """``paged_attention`` by the compiled kernel where there is one: there a row's bits depend neither on the rows beside it nor on
    how its prompt was cut. Queries are the leading N*H of each row. [T, N*V].
    """
    if batch.card is None and _has_kernel(k_cache):
        out: torch.Tensor = torch.ops.antiphon.paged_attention(
            *(rows_TW, k_cache, v_cache, batch.decode_blocks_BM, batch.decode_lens_B, batch.block_size_tokens),
            *(batch.chunk_slots, batch.chunk_rows, num_heads, scale, sliding_window or 0),
            *(0.0 if shaping is None else shaping.softcap or 0.0, None if shaping is None else shaping.sinks_N),
        )
        return out
    q_TNH = rows_TW[:, : num_heads * k_cache.shape[2]].reshape(-1, num_heads, k_cache.shape[2])
    return paged_attention(q_TNH, k_cache, v_cache, batch, scale, sliding_window, shaping).flatten(1)


def attend_context(q_TNH: torch.Tensor, k_CNH: torch.Tensor, v_CNV: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    """``chunk_attention`` of rows that see all of their context, by the compiled kernel where there is one. [T, N, V]."""
    if not _has_kernel(k_CNH):
        return chunk_attention(q_TNH, k_CNH, v_CNV, chunk, scale, None)
    num_rows, num_heads, _ = q_TNH.shape
    context = [torch.arange(k_CNH.shape[0])]
    out: torch.Tensor = torch.ops.antiphon.paged_attention(
        q_TNH.flatten(1), k_CNH, v_CNV, None, None, 1, context, [num_rows], num_heads, scale, 0
    )
    return out.view(num_rows, num_heads, -1)


def _has_kernel(cache: torch.Tensor) -> bool:
    return cache.device.type == "cpu" and not is_card(cache.device) and available()


def _on_card(
    q_TNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    card: CardTables,
    scale: float,
    window: int,
) -> torch.Tensor:
    num_decodes, size = batch.num_decodes, batch.block_size_tokens
    parts = []
    if batch.decode_blocks_BM is not None:
        lens_B = batch.decode_lens_B
        q_BNH = q_TNH.narrow(0, 0, num_decodes)
        parts.append(
            kernels().decode_attention(
                *(q_BNH, k_cache, v_cache, batch.decode_blocks_BM, lens_B, size, scale, window, card.num_parts)
            )
        )
    if card.max_rows:
        chunks = card.first_rows_C, card.num_rows_C, card.num_past_C, card.max_rows
        q_PNH = q_TNH.narrow(0, num_decodes, q_TNH.shape[0] - num_decodes)
        parts.append(kernels().prefill_attention(q_PNH, k_cache, v_cache, card.chunk_blocks_CM, *chunks, size, scale, window))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def slot_attention(
    q_BNH: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots_BC: torch.Tensor, lens_B: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one row a request over the first ``lens_B`` of its slots. [B, N, V]."""
    return _decode(q_BNH, k_cache, v_cache, slots_BC, lens_B, scale, None, None)


def _decode(
    q_BNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_BC: torch.Tensor,
    lens_B: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    shaping: Shaping | None,
) -> torch.Tensor:
    num_requests, num_heads, _ = q_BNH.shape
    num_kv_heads = k_cache.shape[1]
    k_BKHC = k_cache[slots_BC].permute(0, 2, 3, 1)
    v_BKCH = v_cache[slots_BC].transpose(1, 2)
    q_BKGH = q_BNH.reshape(num_requests, num_kv_heads, num_heads // num_kv_heads, -1)
    scores = torch.matmul(q_BKGH, k_BKHC).float().mul_(scale)
    columns_C = torch.arange(slots_BC.shape[1], device=q_BNH.device)
    hidden_BC = columns_C >= lens_B[:, None]
    if sliding_window is not None:
        hidden_BC |= columns_C < lens_B[:, None] - sliding_window
    if shaping is None:
        weights = torch.softmax(scores.masked_fill_(hidden_BC[:, None, None, :], float("-inf")), dim=-1)
    else:
        by_head = scores.view(num_requests, num_heads, 1, -1)
        weights = shaping.weights(by_head, hidden_BC[:, None, None, :]).view(scores.shape)
    out = torch.matmul(weights.to(q_BNH.dtype), v_BKCH)
    return out.reshape(num_requests, num_heads, -1)


def prefill_attention(
    q_TNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunk: Chunk,
    scale: float,
    sliding_window: int | None,
    shaping: Shaping | None = None,
) -> torch.Tensor:
    """Causal attention of one chunk among the rows of q_TNH over its paged context. [chunk's rows, N, H]."""
    q_TNH = q_TNH[chunk.first_row : chunk.first_row + chunk.num_rows]
    num_groups = q_TNH.shape[1] // k_cache.shape[1]
    k_CNH = k_cache[chunk.context_slots].repeat_interleave(num_groups, dim=1)
    v_CNH = v_cache[chunk.context_slots].repeat_interleave(num_groups, dim=1)
    if shaping is not None:
        return _shaped_attention(q_TNH, k_CNH, v_CNH, chunk, scale, sliding_window, shaping)
    return chunk_attention(q_TNH, k_CNH, v_CNH, chunk, scale, sliding_window)


def _shaped_attention(
    q_TNH: torch.Tensor,
    k_CNH: torch.Tensor,
    v_CNV: torch.Tensor,
    chunk: Chunk,
    scale: float,
    sliding_window: int | None,
    shaping: Shaping,
) -> torch.Tensor:
    """``chunk_attention`` with shaped scores, over only the context that some row of a run of rows sees."""
    q_NTH, k_NHC, v_NCV = q_TNH.transpose(0, 1), k_CNH.permute(1, 2, 0), v_CNV.transpose(0, 1)
    parts = []
    for first in range(0, chunk.num_rows, _ROWS):
        last = min(first + _ROWS, chunk.num_rows)
        low = 0 if sliding_window is None else max(0, chunk.num_past + first - sliding_window + 1)
        high = chunk.num_past + last
        rows_T = torch.arange(chunk.num_past + first, high, device=q_TNH.device)[:, None]
        columns_C = torch.arange(low, high, device=q_TNH.device)
        hidden_TC = columns_C > rows_T
        if sliding_window is not None:
            hidden_TC |= columns_C <= rows_T - sliding_window
        scores = torch.matmul(q_NTH[:, first:last], k_NHC[:, :, low:high]).float().mul_(scale)
        parts.append(torch.matmul(shaping.weights(scores, hidden_TC).to(q_TNH.dtype), v_NCV[:, low:high]))
    out_NTV = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out_NTV.transpose(0, 1)


def chunk_attention(
    q_TNH: torch.Tensor,
    k_CNH: torch.Tensor,
    v_CNV: torch.Tensor,
    chunk: Chunk,
    scale: float,
    sliding_window: int | None,
    chosen_TC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a chunk's rows over its context, K and V given per query head. [T, N, V].

    ``chosen_TC``: the tokens that each row sees, where it does not see all.
    """
    if chosen_TC is not None:
        q, k, v = q_TNH.transpose(0, 1)[None], k_CNH.transpose(0, 1)[None], v_CNV.transpose(0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen_TC, scale=scale)[0].transpose(0, 1)
    q, k, v = q_TNH.transpose(0, 1)[None], k_CNH.transpose(0, 1)[None], v_CNV.transpose(0, 1)[None]
    num_context = chunk.context_slots.numel()
    if chunk.num_past == 0 and (sliding_window is None or sliding_window >= num_context):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        rows_T = torch.arange(chunk.num_past, num_context, device=q_TNH.device)[:, None]
        columns_C = torch.arange(num_context, device=q_TNH.device)
        seen_TC = columns_C <= rows_T
        if sliding_window is not None:
            seen_TC &= columns_C > rows_T - sliding_window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TC, scale=scale)
    return out[0].transpose(0, 1)
