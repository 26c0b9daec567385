"""The two halves of a decoder (hot), each built from only its own tensors of a checkpoint.

    attention half of layer i:  rows = ffn_norm(x += attention(input_norm(x)))        -> A2F
    FFN half of layer i:        f = down(act(gate(rows)) * up(rows))                   -> F2A (a partial sum per slice)
    next attention half:        x += f

Legend: T rows, D hidden, N query heads, K KV heads, H head dim, V vocabulary, I intermediate size (of this shard).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.ids import FFNShard, slice_bounds
from antiphon.core.kv import KVLayout
from antiphon.models.attention import AttentionBatch, paged_attention
from antiphon.models.checkpoint import Checkpoint
from antiphon.models.config import AttentionConfig, DecoderConfig, FFNConfig, TensorNames
from antiphon.models.kv_cache import KVCache
from antiphon.models.layers import RMSNorm, Rope, gated
from antiphon.models.linear import Linear


class Weights:
    """Reads named tensors of one worker and remembers which: what is resident is what was read here."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self.resident_bytes: dict[str, int] = {}  # tensor name -> bytes held here

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or a slice of its rows and columns, in the worker's dtype. Raises CheckpointInvalid."""
        tensor = self._checkpoint.tensor(name, rows=rows, cols=cols, dtype=self._dtype).to(self._device)
        self.resident_bytes[name] = tensor.numel() * tensor.element_size()
        return tensor


@dataclass(slots=True, kw_only=True)
class StepState:
    """What the attention halves share within one ubatch of one step: the residual stream and the rotary tables."""

    x_TD: torch.Tensor
    batch: AttentionBatch
    rope_tables: tuple[torch.Tensor, torch.Tensor]


class _GroupedQueryAttention:
    """Grouped-query attention of one layer (arXiv 2305.13245)."""

    def __init__(self, config: AttentionConfig, weights: Weights, names: TensorNames, prefix: str, rope: Rope, eps: float) -> None:
        self._config = config
        self._rope = rope
        parts = [prefix + names.q, prefix + names.k, prefix + names.v]
        weight = torch.cat([weights.read(part + ".weight") for part in parts])
        bias = torch.cat([weights.read(part + ".bias") for part in parts]) if config.qkv_bias else None
        self._qkv = Linear(weight, bias)
        self._out = Linear(
            weights.read(prefix + names.o + ".weight"),
            weights.read(prefix + names.o + ".bias") if config.output_bias else None,
        )
        self._q_norm = RMSNorm(weights.read(prefix + names.q_norm), eps) if config.qk_norm else None
        self._k_norm = RMSNorm(weights.read(prefix + names.k_norm), eps) if config.qk_norm else None

    def __call__(self, x_TD: torch.Tensor, state: StepState, layer: int, cache: KVCache) -> torch.Tensor:
        c = self._config
        num_rows = x_TD.shape[0]
        qkv = self._qkv(x_TD).view(num_rows, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q_TNH, k_TKH, v_TKH = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            q_TNH, k_TKH = self._q_norm(q_TNH), self._k_norm(k_TKH)
        q_TNH = self._rope.rotate(q_TNH, state.rope_tables)
        k_TKH = self._rope.rotate(k_TKH, state.rope_tables)
        cache.write(layer, state.batch.slots_T, (k_TKH, v_TKH))
        k_cache, v_cache = cache.planes[layer]
        out_TNH = paged_attention(q_TNH, k_cache, v_cache, state.batch, c.scale, c.sliding_window)
        return self._out(out_TNH.reshape(num_rows, c.num_heads * c.head_dim))


class AttentionHalves:
    """Embedding, the attention half of every layer, norms and the LM head. Holds no FFN weight."""

    def __init__(
        self, config: DecoderConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        weights = Weights(checkpoint, dtype, device)
        names = config.names
        self._embed_VD = weights.read(names.embed)
        ropes: dict[object, Rope] = {}
        self._input_norms: list[RMSNorm] = []
        self._attention: list[_GroupedQueryAttention] = []
        self._ffn_norms: list[RMSNorm] = []
        for i, layer in enumerate(config.layers):
            prefix = names.layer.format(i=i)
            rope_config = layer.attention.rope
            if rope_config not in ropes:
                ropes[rope_config] = Rope(rope_config, max_model_len, dtype, device)
            rope = ropes[rope_config]
            self._input_norms.append(RMSNorm(weights.read(prefix + names.input_norm), config.norm_eps))
            self._attention.append(_GroupedQueryAttention(layer.attention, weights, names, prefix, rope, config.norm_eps))
            self._ffn_norms.append(RMSNorm(weights.read(prefix + names.ffn_norm), config.norm_eps))
        self._rope = next(iter(ropes.values()))
        self._final_norm = RMSNorm(weights.read(names.final_norm), config.norm_eps)
        self._lm_head = Linear(self._embed_VD if config.tie_embeddings else weights.read(names.lm_head))
        self.resident_bytes = weights.resident_bytes

    def begin(self, token_ids_T: torch.Tensor, batch: AttentionBatch) -> StepState:
        """Embed the rows of one ubatch."""
        x_TD = self._embed_VD[token_ids_T]
        return StepState(x_TD=x_TD, batch=batch, rope_tables=self._rope.tables(batch.positions_T))

    def attend(self, layer: int, state: StepState, cache: KVCache) -> torch.Tensor:
        """The attention half; advances the residual stream and returns the normed rows for the FFN, [T, D]."""
        normed = self._input_norms[layer](state.x_TD)
        state.x_TD.add_(self._attention[layer](normed, state, layer, cache))
        return self._ffn_norms[layer](state.x_TD)

    def combine(self, layer: int, state: StepState, ffn_TD: torch.Tensor) -> None:
        """Add the FFN's result of ``layer`` to the residual stream."""
        state.x_TD.add_(ffn_TD)

    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] from rows of the residual stream."""
        return self._lm_head(self._final_norm(x_RD)).float()


class _DenseFFN:
    """One shard of a gated FFN: a slice of the intermediate dimension; the shards' results sum up."""

    def __init__(self, config: FFNConfig, weights: Weights, names: TensorNames, prefix: str, shard: FFNShard) -> None:
        low, high = slice_bounds(config.intermediate_size, shard.tensor_index, shard.num_tensor)
        self._activation = config.activation
        gate_up = torch.cat(
            [
                weights.read(prefix + names.gate + ".weight", rows=(low, high)),
                weights.read(prefix + names.up + ".weight", rows=(low, high)),
            ]
        )
        gate_up_bias = down_bias = None
        if config.bias:
            gate_up_bias = torch.cat(
                [weights.read(prefix + names.gate + ".bias")[low:high], weights.read(prefix + names.up + ".bias")[low:high]]
            )
            # Added once: by the first slice.
            down_bias = weights.read(prefix + names.down + ".bias") if shard.tensor_index == 0 else None
        self._gate_up = Linear(gate_up, gate_up_bias)
        self._down = Linear(weights.read(prefix + names.down + ".weight", cols=(low, high)), down_bias)

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        return self._down(gated(self._gate_up(rows_TD), self._activation))


class FFNHalves:
    """The FFN half of every layer, one shard of it. Holds no attention weight; stateless between calls."""

    def __init__(
        self, config: DecoderConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, shard: FFNShard
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.shard = shard
        weights = Weights(checkpoint, dtype, device)
        self._ffns = [
            _DenseFFN(layer.ffn, weights, config.names, config.names.layer.format(i=i), shard)
            for i, layer in enumerate(config.layers)
        ]
        self.resident_bytes = weights.resident_bytes

    def compute(self, layer: int, rows_TD: torch.Tensor) -> torch.Tensor:
        """This shard's partial sum for every row, [T, D]."""
        return self._ffns[layer](rows_TD)


def kv_layout(config: DecoderConfig, dtype: torch.dtype, block_size_tokens: int) -> KVLayout:
    """How this decoder's KV is laid out."""
    return KVLayout(
        num_layers=config.num_layers,
        planes=config.layers[0].attention.planes,
        block_size_tokens=block_size_tokens,
        dtype=str(dtype).removeprefix("torch."),
        itemsize_bytes=dtype.itemsize,
    )
