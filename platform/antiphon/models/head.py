"""The LM head: last hidden states, logits, likeliest tokens; whole, or a slice of the vocabulary at a time (hot).

A row's logits have the same bits either way. Legend: R rows, D hidden, V vocabulary. Must not know: layers, sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.models.layers.functional import Norm
from antiphon.models.layers.linear import Linear

_SLICE = 4096  # outputs; some 100 us for a few rows: no rows of others wait longer for that


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadResult:
    """What a head says of rows: all logits, or the likeliest token and its logit alone."""

    logits_RV: torch.Tensor | None = None  # fp32
    best: tuple[torch.Tensor, torch.Tensor] | None = None  # int64 [R], fp32 [R]


class LMHead:
    """The final norm and the product with the vocabulary."""

    def __init__(self, norm: Norm, linear: Linear, softcap: float | None) -> None:
        self.linear = linear
        self._norm = norm
        self._softcap = softcap
        self._slices: list[tuple[int, Linear]] | None = None

    def hidden(self, x_RD: torch.Tensor) -> torch.Tensor:
        """The model's last hidden states, [R, D], from rows of the residual stream."""
        return self._norm(x_RD)

    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] from rows of the residual stream."""
        return self._capped(self.linear.in_fp32(self._norm(x_RD)))

    def greedy(self, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely token of each row, int64 [R], and its logit, fp32 [R], which is no number where the row is none."""
        if self._softcap is not None:  # a cap can round two logits to one
            values_R, ids_R = self.logits(x_RD).max(dim=-1)
            return ids_R, values_R
        return self.linear.best(self._norm(x_RD))

    def begin(self, x_RD: torch.Tensor, *, best_only: bool) -> SlicedHead:
        """The same of these rows, to be computed a slice at a time."""
        if self._slices is None:
            self._slices = self.linear.sliced(_SLICE)
        return SlicedHead(self, self._slices, x_RD, best_only=best_only)

    def _capped(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return logits_RV if self._softcap is None else torch.tanh(logits_RV / self._softcap) * self._softcap


class SlicedHead:
    """What ``LMHead`` says of some rows, while it is computed."""

    def __init__(self, head: LMHead, slices: list[tuple[int, Linear]], x_RD: torch.Tensor, *, best_only: bool) -> None:
        self.result: HeadResult | None = None  # once ``go_on`` has said that it is there
        self._head = head
        self._slices = slices
        self._best_only = best_only and head._softcap is None
        self._wants_best = best_only
        self._hidden_RD = head.hidden(x_RD)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._logits_RV = None if self._best_only else x_RD.new_empty(x_RD.shape[0], head.linear.out_features, dtype=torch.float32)
        self._next = 0

    def go_on(self) -> bool:
        """Compute one slice; True when that was the last."""
        first, linear = self._slices[self._next]
        self._next += 1
        if self._logits_RV is None:
            ids_R, values_R = linear.best(self._hidden_RD)
            self._parts.append((ids_R + first, values_R))
        else:
            self._logits_RV[:, first : first + linear.out_features] = linear.in_fp32(self._hidden_RD)
        if self._next < len(self._slices):
            return False
        self.result = self._ended()
        return True

    def _ended(self) -> HeadResult:
        if self._logits_RV is None:
            values_RS = torch.stack([values_R for _, values_R in self._parts], dim=1)
            values_R, slices_R = values_RS.max(dim=1)  # the first of equals, and no number before any
            ids_RS = torch.stack([ids_R for ids_R, _ in self._parts], dim=1)
            return HeadResult(best=(ids_RS.gather(1, slices_R[:, None])[:, 0], values_R))
        logits_RV = self._head._capped(self._logits_RV)
        if not self._wants_best:
            return HeadResult(logits_RV=logits_RV)
        values_R, ids_R = logits_RV.max(dim=-1)
        return HeadResult(best=(ids_R, values_R))
