"""Where the experts of one layer are in a checkpoint, and one expert's weights out of it (control speed: also while serving).

Three layouts: each expert has tensors of its own; a tensor [E, ...] per projection holds all; or gate and up share one, transposed,
their columns in turn, perhaps as MXFP4 (gpt-oss). Must not know: who computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.ids import FFNShard, slice_bounds
from antiphon.models.config import LayerConfig, MoEConfig
from antiphon.models.layers.quantized import Part
from antiphon.models.loading.stored.mxfp4 import is_mxfp4, read_mxfp4
from antiphon.models.loading.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One expert, or a shard's slice of it W wide: gate and up [W, D], down [D, W], and biases [2W] and [D]."""

    gate: Part
    up: Part
    down: Part
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class ExpertReader:
    """Reads experts of one layer for one shard; the last id is the shared expert's."""

    def __init__(self, config: MoEConfig, weights: Weights, layer: LayerConfig, shard: FFNShard, *, keep_four_bit: bool) -> None:
        """``keep_four_bit``: whether weights that are stored in four bits stay so."""
        self._config = config
        self._weights = weights
        self._layer = layer
        self._shard = shard
        self._keeps = keep_four_bit

    @property
    def is_four_bit(self) -> bool:
        """Whether routed experts come in four bits."""
        fused = self._layer.names.fused_experts
        if not self._keeps:
            return False
        if fused is not None:
            return is_mxfp4(self._weights.checkpoint, self._layer.prefix + fused + "gate_up_proj")
        return self._weights.is_four_bit(self.keys(0)[0])

    def keys(self, expert: int) -> tuple[str, str, str]:
        """Names of gate, up and down, under which an expert's bytes are noted: one tensor may hold all experts."""
        names, prefix = self._layer.names, self._layer.prefix
        if expert == self._config.gate.num_experts:
            gate, up, down = (prefix + names.shared + part + ".weight" for part in (names.gate, names.up, names.down))
            return gate, up, down
        parts = (names.expert_gate, names.expert_up, names.expert_down)
        stem = names.stacked_experts if names.fused_experts is None else names.fused_experts
        if stem is not None:
            gate, up, down = (f"{prefix}{stem}{part}.weight[{expert}]" for part in parts)
        else:
            gate, up, down = (prefix + names.expert.format(e=expert) + part + ".weight" for part in parts)
        return gate, up, down

    def read(self, expert: int) -> ExpertWeights:
        """One expert's slice. Raises CheckpointInvalid."""
        is_shared = expert == self._config.gate.num_experts
        width = self._config.shared_intermediate_size if is_shared else self._config.intermediate_size
        bounds = slice_bounds(width, self._shard.tensor_index, self._shard.num_tensor)
        names = self._layer.names
        if not is_shared and names.fused_experts is not None:
            return self._fused(expert, self._layer.prefix + names.fused_experts, bounds)
        if not is_shared and names.stacked_experts is not None:
            return self._stacked(expert, bounds)
        gate, up, down = self.keys(expert)
        read = self._weights.part if self._keeps else self._weights.read
        return ExpertWeights(gate=read(gate, rows=bounds), up=read(up, rows=bounds), down=read(down, cols=bounds))

    def _stacked(self, expert: int, bounds: tuple[int, int]) -> ExpertWeights:
        which = (expert, expert + 1)
        gate, up, down = (key.removesuffix(f"[{expert}]") for key in self.keys(expert))
        read = self._weights.read
        return ExpertWeights(
            gate=read(gate, rows=which, cols=bounds)[0],
            up=read(up, rows=which, cols=bounds)[0],
            down=read(down, rows=which)[0][:, bounds[0] : bounds[1]].contiguous(),
        )

    def _fused(self, expert: int, stem: str, bounds: tuple[int, int]) -> ExpertWeights:
        weights, config = self._weights, self._config
        num_experts, width, hidden = config.gate.num_experts, config.intermediate_size, weights.shape(stem + "down_proj_bias")[1]
        which, (low, high) = (expert, expert + 1), bounds
        gate: Part
        up: Part
        down: Part
        if is_mxfp4(weights.checkpoint, stem + "gate_up_proj"):
            both = read_mxfp4(
                weights.checkpoint, stem + "gate_up_proj", expert, (num_experts, 2 * width, hidden), (2 * low, 2 * high)
            )
            gate, up = both.rows(slice(0, None, 2)), both.rows(slice(1, None, 2))
            shape = (num_experts, hidden, width)
            down = read_mxfp4(weights.checkpoint, stem + "down_proj", expert, shape, (0, hidden)).cols(low, high)
            if not self._keeps:
                gate, up, down = (part.values(weights.dtype).to(weights.device) for part in (gate, up, down))
        else:
            both_DC = weights.read(stem + "gate_up_proj", rows=which)[0][:, 2 * low : 2 * high]
            gate, up = both_DC[:, 0::2].T.contiguous(), both_DC[:, 1::2].T.contiguous()
            down = weights.read(stem + "down_proj", rows=which, cols=bounds)[0].T.contiguous()
        bias_C = weights.read(stem + "gate_up_proj_bias", rows=which, cols=(2 * low, 2 * high))[0]
        # Added once: by the first slice.
        down_bias = weights.read(stem + "down_proj_bias", rows=which)[0] if self._shard.tensor_index == 0 else None
        for part in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            weights.resident_bytes.pop(stem + part, None)  # read on the way
        return ExpertWeights(gate=gate, up=up, down=down, gate_up_bias=torch.cat((bias_C[0::2], bias_C[1::2])), down_bias=down_bias)
