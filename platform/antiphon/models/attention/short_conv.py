"""A gated short convolution in attention's place (LFM2, arXiv 2511.23404 §2) (hot).

    b, c, x = in(rows)        out(c · conv(b · x))

Legend: T rows, D hidden. Must not know: families, the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.models.attention.convolution import CausalConv
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.attention.paged import AttentionBatch
from antiphon.models.attention.states import StateBatch
from antiphon.models.config import LayerConfig, ShortConvConfig
from antiphon.models.layers.linear import Linear
from antiphon.models.loading.weights import Weights


class ShortConv:
    """One projection in, a convolution between two gates, one projection out."""

    def __init__(self, config: ShortConvConfig, weights: Weights, layer: LayerConfig) -> None:
        prefix = layer.prefix + layer.names.attention

        def linear(name: str) -> Linear:
            return Linear(weights.read(prefix + name + ".weight"), weights.read(prefix + name + ".bias") if config.bias else None)

        self._in = linear("in_proj")
        self._conv = CausalConv.read(weights, prefix + "conv", bias=config.bias, silu=False)
        self._out = linear("out_proj")

    def __call__(self, x_TD: torch.Tensor, batch: AttentionBatch, layer: int, cache: KVCache) -> torch.Tensor:
        """[T, D], newly allocated; the rows' states are where the batch says afterwards."""
        states, planes = batch.states, cache.states[layer]
        assert states is not None  # the batch is laid out for a cache that has states
        b_TD, c_TD, x_TD = self._in(x_TD).chunk(3, dim=1)
        gated_TD = b_TD * x_TD
        if states.has_guesses:
            states.on_redo(lambda rows_R, again: self._advance(gated_TD.index_select(0, rows_R), planes, again))
        convolved = self._advance(gated_TD, planes, states)
        return self._out(c_TD * convolved.to(c_TD.dtype))

    def _advance(self, gated_TD: torch.Tensor, planes: Sequence[torch.Tensor], states: StateBatch) -> torch.Tensor:
        """fp32 [T, D]; the states are moved."""
        convolved = self._conv(gated_TD, planes[0], states)
        states.keep(planes)
        return convolved
