"""Linear attention by the gated delta rule of one layer: Gated DeltaNet and Kimi Delta Attention (hot).

    q, k, v = silu(conv(projections))       g, beta per head and token       out = project(norm(rule(q, k, v, g, beta)) · act(z))

Legend: T rows, D hidden, N heads, K key dims, V value dims, C channels of the convolution.
Must not know: families, the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from antiphon.models.attention.convolution import CausalConv
from antiphon.models.attention.delta_rule import DeltaInputs, decay, delta_chunks, delta_step, unit
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch
from antiphon.models.attention.states import StateBatch
from antiphon.models.config import DeltaConfig, LayerConfig
from antiphon.models.layers.linear import Linear
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projected:
    """What the rows' projections give; the parts may be views of one tensor."""

    qkv_TC: torch.Tensor
    z_TNV: torch.Tensor  # [T, N·V], gate of the output
    beta_TN: torch.Tensor  # before the sigmoid
    decay_T: torch.Tensor  # [T, N] or [T, N·K], before bias and softplus

    def rows(self, rows_R: torch.Tensor) -> _Projected:
        """Of these rows."""
        return _Projected(
            qkv_TC=self.qkv_TC.index_select(0, rows_R),
            z_TNV=self.z_TNV.index_select(0, rows_R),
            beta_TN=self.beta_TN.index_select(0, rows_R),
            decay_T=self.decay_T.index_select(0, rows_R),
        )


class DeltaAttention:
    """Projections, convolution, the rule over states in fp32, a gated norm, and the output projection."""

    def __init__(self, config: DeltaConfig, weights: Weights, layer: LayerConfig) -> None:
        self._config = c = config
        prefix = layer.prefix + layer.names.attention
        self._is_kimi = c.form == "kimi"
        self._low_ranks: tuple[Linear, Linear] | None = None  # of decay and gate, from what the first projection gives
        kinds = ("q_", "k_", "v_") if self._is_kimi else ("",)
        filters = torch.cat([weights.read(f"{prefix}{kind}conv1d.weight", dtype=torch.float32) for kind in kinds])
        self._conv = CausalConv(filters, silu=True)
        if self._is_kimi:
            parts = [
                weights.read(f"{prefix}{name}.weight") for name in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
            ]
            self._low_ranks = (
                Linear(weights.read(prefix + "f_b_proj.weight")),
                Linear(weights.read(prefix + "g_b_proj.weight")),
            )
            self._widths = [c.conv_width, *(part.shape[0] for part in parts[3:])]
        elif c.form == "split":
            parts = [weights.read(f"{prefix}in_proj_{name}.weight") for name in ("qkv", "z", "b", "a")]
            self._widths = [part.shape[0] for part in parts]
        else:
            parts = _by_part(c, weights.read(prefix + "in_proj_qkvz.weight"), weights.read(prefix + "in_proj_ba.weight"))
            self._widths = [c.conv_width, c.num_heads * c.value_dim, c.num_heads, c.num_heads]
        self._in = Linear(torch.cat(parts))
        num_decays = c.num_heads * (c.key_dim if self._is_kimi else 1)
        self._bias = weights.read(prefix + "dt_bias", dtype=torch.float32).reshape(num_decays)
        self._rate_N = -weights.read(prefix + "A_log", dtype=torch.float32).reshape(c.num_heads).exp()
        self._norm_V = weights.read(prefix + ("o_norm" if self._is_kimi else "norm") + ".weight", dtype=torch.float32)
        self._out = Linear(weights.read(f"{prefix}{layer.names.attention_out}.weight"))
        self._native = weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.bfloat16) and available()

    def __call__(self, x_TD: torch.Tensor, batch: AttentionBatch, layer: int, cache: KVCache) -> torch.Tensor:
        """[T, D], newly allocated; the rows' states are where the batch says afterwards."""
        states, planes = batch.states, cache.states[layer]
        assert states is not None  # the batch is laid out for a cache that has states
        rows = self._project(x_TD)
        if states.has_guesses:
            states.on_redo(lambda rows_R, again: self._advance(rows.rows(rows_R), planes, again))
        return self._out(self._advance(rows, planes, states))

    def _advance(self, rows: _Projected, planes: Sequence[torch.Tensor], states: StateBatch) -> torch.Tensor:
        """What goes to the last projection, [T, N·V]; the states are moved."""
        qkv_TC = self._conv(rows.qkv_TC, planes[0], states)
        attend = self._attend_natively if self._native else self._attend
        normed = attend(rows, qkv_TC, planes[1], states)
        states.keep(planes)
        return normed

    def _project(self, x_TD: torch.Tensor) -> _Projected:
        parts = torch.split_with_sizes(self._in(x_TD), self._widths, dim=1)
        if self._low_ranks is None:
            return _Projected(qkv_TC=parts[0], z_TNV=parts[1], beta_TN=parts[2], decay_T=parts[3])
        of_decay, of_gate = self._low_ranks
        return _Projected(
            qkv_TC=parts[0], beta_TN=parts[1], decay_T=of_decay(parts[2].contiguous()), z_TNV=of_gate(parts[3].contiguous())
        )

    def _attend_natively(self, rows: _Projected, qkv_TC: torch.Tensor, plane: torch.Tensor, states: StateBatch) -> torch.Tensor:
        c = self._config
        out: torch.Tensor = torch.ops.antiphon.gated_delta(
            *(qkv_TC, rows.z_TNV, rows.beta_TN, rows.decay_T, self._bias, self._rate_N, self._norm_V),
            *(plane, states.read_B, states.write_B, states.chunk_numbers, c.num_key_heads, c.norm_eps, self._is_kimi),
        )
        return out

    def _attend(self, rows: _Projected, qkv_TC: torch.Tensor, plane: torch.Tensor, states: StateBatch) -> torch.Tensor:
        c = self._config
        num_rows, key_width = qkv_TC.shape[0], c.num_key_heads * c.key_dim
        q, k, v = torch.split_with_sizes(qkv_TC, [key_width, key_width, c.num_heads * c.value_dim], dim=1)
        q_TNK, k_TNK = (
            unit(part.reshape(num_rows, c.num_key_heads, c.key_dim)).repeat_interleave(c.num_heads // c.num_key_heads, dim=1)
            for part in (q, k)
        )
        q_TNK = q_TNK * c.key_dim**-0.5
        v_TNV = v.reshape(num_rows, c.num_heads, c.value_dim)
        beta_TN = rows.beta_TN.float().sigmoid()
        g_TNg = decay(
            rows.decay_T.reshape(num_rows, c.num_heads, -1), self._bias.view(c.num_heads, -1), self._rate_N.view(c.num_heads, 1)
        )
        inputs = DeltaInputs(q_TNK=q_TNK, k_TNK=k_TNK, v_TNV=v_TNV, g_TNg=g_TNg, beta_TN=beta_TN)
        parts = []
        num_decodes = states.num_decodes
        if num_decodes:
            out, after = delta_step(inputs.rows(0, num_decodes), plane.index_select(0, states.read_B))
            plane.index_copy_(0, states.write_B, after)
            parts.append(out)
        for chunk in states.chunks:
            out, after = delta_chunks(inputs.rows(chunk.first_row, chunk.first_row + chunk.num_rows), plane[chunk.read])
            plane[chunk.write].copy_(after)
            parts.append(out)
        out_TNV = parts[0] if len(parts) == 1 else torch.cat(parts)
        z_TNV = rows.z_TNV.float().view(num_rows, c.num_heads, c.value_dim)
        gate = z_TNV.sigmoid() if self._is_kimi else F.silu(z_TNV)
        normed = F.rms_norm(out_TNV, (c.value_dim,), self._norm_V, c.norm_eps) * gate
        return normed.reshape(num_rows, -1).to(rows.z_TNV.dtype)


def _by_part(c: DeltaConfig, qkvz: torch.Tensor, ba: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v, z, b and a for all heads, from tensors that have them together for each key head."""
    each = c.num_heads // c.num_key_heads
    sizes = [c.key_dim, c.key_dim, each * c.value_dim, each * c.value_dim]
    first = torch.split_with_sizes(qkvz.view(c.num_key_heads, sum(sizes), -1), sizes, dim=1)
    second = torch.split_with_sizes(ba.view(c.num_key_heads, 2 * each, -1), [each, each], dim=1)
    return [part.reshape(-1, part.shape[-1]) for part in (*first, *second)]
