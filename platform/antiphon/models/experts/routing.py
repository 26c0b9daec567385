"""Where the rows of one layer go: the gate with its weights, and what it says (hot; attention side).

    rows ──gate──► ids and weights of experts that compute        travel with the rows
                   weights of identity experts                     stay: the row itself is added here
                   null experts                                     nothing

Legend: T rows, D hidden, E choices, K ids per row. Must not know: shards, links, weights of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.device.device import is_card
from antiphon.models.cards import kernels
from antiphon.models.config import LayerConfig, MoEConfig
from antiphon.models.experts.gates import choose, is_identity
from antiphon.models.layers.linear import Linear
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available

NO_EXPERT = -1
_BLOCK = 32  # the kernel's, to which sizes are padded


@dataclass(slots=True, kw_only=True)
class Routing:
    """Experts of each row; ids run over the layer's routed experts and, last, its shared one."""

    ids_TK: torch.Tensor  # int64, NO_EXPERT where a row takes fewer
    weights_TK: torch.Tensor  # fp32
    is_full: bool  # no NO_EXPERT among the ids; on a card they may be among them all the same, and rows travel whole
    identity_T: torch.Tensor | None = None  # fp32: weight of the row itself
    bad_rows: tuple[int, ...] = ()  # rows whose logits are non-finite; they take no expert
    bad_T: torch.Tensor | None = None  # bool: the same on a card, where it is looked at when the step is over


class Router:
    """The gate of one layer. Scores in fp32 whatever the rows are in. Common gates are one call of the compiled kernel."""

    def __init__(self, config: MoEConfig, weights: Weights, layer: LayerConfig) -> None:
        gate, names = config.gate, layer.names
        fp32 = torch.float32
        self.config = config
        self.skip_below = 0.0  # share of a row's weight below which an expert is skipped; the row's best never is
        self._num_chosen_and_skipped = torch.zeros(2, dtype=torch.int64, device=weights.device)
        logit_bias = weights.read(layer.prefix + names.router_bias, dtype=fp32) if gate.has_logit_bias else None
        self._linear = Linear(weights.read(layer.prefix + names.router, dtype=fp32), logit_bias)
        self._bias = weights.read(layer.prefix + names.correction_bias, dtype=fp32) if gate.has_correction_bias else None
        self._scale = weights.read(layer.prefix + names.expert_scale, dtype=fp32).flatten() if gate.has_expert_scale else None
        self._shared_gate = weights.read(layer.prefix + names.shared_gate, dtype=fp32) if config.has_shared_gate else None
        self._card = kernels() if is_card(weights.device) else None
        self._packed = self._pack(weights.read(layer.prefix + names.router, dtype=fp32))

    @property
    def num_chosen(self) -> int:
        """Experts that rows chose since start, while skipping is on."""
        return int(self._num_chosen_and_skipped[0])

    @property
    def num_skipped(self) -> int:
        """How many of them were skipped."""
        return int(self._num_chosen_and_skipped[1])

    def __call__(self, rows_TD: torch.Tensor) -> Routing:
        """Choose the experts of every row."""
        if self._card is not None:
            return self._on_card(rows_TD.float())
        if self._packed is not None and self.skip_below == 0.0 and rows_TD.stride(1) == 1:
            return self._by_kernel(rows_TD, self._packed)
        gate = self.config.gate
        rows_TD = rows_TD.float()
        ids_TK, weights_TK = choose(gate, self._linear(rows_TD), self._bias, self._scale)
        identity_T = None
        is_full = True
        if gate.num_identity:
            identity_T = weights_TK.masked_fill(~is_identity(gate, ids_TK), 0.0).sum(dim=-1)
        if gate.num_identity or gate.num_null:
            ids_TK = ids_TK.masked_fill(ids_TK >= gate.num_experts, NO_EXPERT)
            is_full = False
        if self.skip_below > 0.0:
            ids_TK = self._skip(ids_TK, weights_TK)
            is_full = False
        if self.config.shared_intermediate_size:
            ids_TK, weights_TK = self._with_shared(rows_TD, ids_TK, weights_TK)
        bad_rows: tuple[int, ...] = ()
        if not bool(torch.isfinite(weights_TK.sum())):
            bad_T = ~torch.isfinite(weights_TK.sum(dim=-1))
            bad_rows = tuple(bad_T.nonzero().flatten().tolist())
            ids_TK, weights_TK = ids_TK.masked_fill(bad_T[:, None], NO_EXPERT), weights_TK.masked_fill(bad_T[:, None], 0.0)
            is_full = False
        return Routing(ids_TK=ids_TK, weights_TK=weights_TK, is_full=is_full, identity_T=identity_T, bad_rows=bad_rows)

    def _on_card(self, rows_TD: torch.Tensor) -> Routing:
        """The same without a question to the host: what is wrong with rows is a word per row, for later."""
        gate, logits_TE = self.config.gate, self._linear(rows_TD)
        identity_T = None
        if self._scale is None and gate.choice in ("top_k", "group_limited") and not (gate.num_null or gate.num_identity):
            is_limited = gate.choice == "group_limited" and gate.num_groups > 1
            counted = (1 if gate.group_score == "max" else 2) if is_limited else 0
            assert self._card is not None
            ids_TK, weights_TK, bad = self._card.gate(
                *(logits_TE, self._bias, gate.top_k, gate.scoring == "sigmoid", gate.renormalise, gate.scale),
                *(gate.num_groups, gate.num_kept_groups, min(counted, gate.num_experts // gate.num_groups)),
            )
            bad_T = bad != 0
        else:
            bad_T = ~torch.isfinite(logits_TE.sum(dim=-1))
            ids_TK, weights_TK = choose(gate, logits_TE.masked_fill(bad_T.unsqueeze(1), 0.0), self._bias, self._scale)
            if gate.num_identity:
                identity_T = weights_TK.masked_fill(~is_identity(gate, ids_TK), 0.0).sum(dim=-1)
            if gate.num_identity or gate.num_null:
                ids_TK = ids_TK.masked_fill(ids_TK >= gate.num_experts, NO_EXPERT)
        if self.skip_below > 0.0:
            ids_TK = self._skip(ids_TK, weights_TK)
        if self.config.shared_intermediate_size:
            ids_TK, weights_TK = self._with_shared(rows_TD, ids_TK, weights_TK)
        ids_TK = ids_TK.masked_fill(bad_T.unsqueeze(1), NO_EXPERT)
        weights_TK = weights_TK.masked_fill(bad_T.unsqueeze(1), 0.0)
        return Routing(ids_TK=ids_TK, weights_TK=weights_TK, is_full=True, identity_T=identity_T, bad_T=bad_T)

    def _pack(self, weight_ED: torch.Tensor) -> torch.Tensor | None:
        """The gate's rows and, behind them, the shared expert's gate as the kernel wants them; None: torch computes this gate."""
        gate = self.config.gate
        if gate.choice not in ("top_k", "group_limited") or gate.num_null or gate.num_identity or gate.has_logit_bias:
            return None
        if weight_ED.device.type != "cpu" or not available():
            return None
        if self._shared_gate is not None:
            weight_ED = torch.cat((weight_ED, self._shared_gate))
        outputs, inputs = (-(-size // _BLOCK) * _BLOCK for size in weight_ED.shape)
        packed = torch.empty(outputs * inputs)
        torch.ops.antiphon.pack_experts(packed, weight_ED, None, 1)
        return packed

    def _by_kernel(self, rows_TD: torch.Tensor, packed: torch.Tensor) -> Routing:
        gate, num_rows = self.config.gate, rows_TD.shape[0]
        ids_TK = torch.empty((num_rows, self.config.experts_per_row), dtype=torch.int64)
        weights_TK = torch.empty((num_rows, self.config.experts_per_row), dtype=torch.float32)
        is_limited = gate.choice == "group_limited" and gate.num_groups > 1
        num_bad = torch.ops.antiphon.route(
            ids_TK,
            weights_TK,
            rows_TD,
            packed,
            self._bias,
            self._scale,
            gate.num_experts,
            gate.top_k,
            self._shared_gate is not None,
            gate.scoring == "sigmoid",
            gate.renormalise,
            gate.scale,
            gate.num_groups,
            gate.num_kept_groups,
            (1 if gate.group_score == "max" else 2) if is_limited else 0,
        )
        bad_rows = tuple((ids_TK[:, 0] == NO_EXPERT).nonzero().flatten().tolist()) if num_bad else ()
        return Routing(ids_TK=ids_TK, weights_TK=weights_TK, is_full=not num_bad, bad_rows=bad_rows)

    def _skip(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        computing_TK = ids_TK >= 0
        weights_TK = weights_TK.masked_fill(~computing_TK, 0.0)
        best_T1 = weights_TK.amax(dim=1, keepdim=True)
        small_TK = weights_TK < self.skip_below * weights_TK.sum(dim=1, keepdim=True)
        skipped_TK = computing_TK & small_TK & (weights_TK < best_T1)
        self._num_chosen_and_skipped += torch.stack((computing_TK.sum(), skipped_TK.sum()))
        return ids_TK.masked_fill(skipped_TK, NO_EXPERT)

    def _with_shared(
        self, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shared = ids_TK.new_full((ids_TK.shape[0], 1), self.config.gate.num_experts)
        if self._shared_gate is None:
            weight = weights_TK.new_ones(ids_TK.shape[0], 1)
        else:
            weight = torch.sigmoid(rows_TD @ self._shared_gate.T)
        return torch.cat((ids_TK, shared), dim=1), torch.cat((weights_TK, weight), dim=1)
