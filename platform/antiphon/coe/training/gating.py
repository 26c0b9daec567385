"""Chooses below which familiarity the general expert serves (control speed, offline).

A gate that closes on prompts of known kinds loses what routing gains there; one that stays open on foreign prompts loses what
routing harms there. Both are measured on models that had not seen the prompts: those of inner folds, and those that had one
more dataset left out. Must not know: embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from antiphon.coe.routing.assessment import Floats, Gate

Doubles = npt.NDArray[np.float64]

OPEN = Gate(weight=1.0, bias=0.0, threshold=0.0)
# Shares of prompts of known kinds that the gate may close on; what is closed there is the price of closing on foreign ones.
_SHARES = (0.0, 0.04, 0.08, 0.12, 0.16, 0.24)
# With a share of none, the gate still closes this many standard deviations below the least familiar prompt: what is like nothing
# that was learnt from is not known, however well routing went.
_MARGIN = 0.5
_USUAL = 2  # the share that is taken unless another is better beyond doubt
# Standard errors, over datasets left out. Gains differ far more between datasets than within: a best share that is taken for
# granted is the best for the datasets at hand, and a bad one for the next.
_BEYOND_DOUBT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Prompts that a model had not seen: the gate's signal, and the score its pick has over the general expert's."""

    signal_B: Floats
    gain_B: Doubles


def choose_gate(inside: Sequence[Rehearsal], outside: Sequence[Rehearsal]) -> Gate:
    """The gate by prompts of known kinds, ``inside``, and of foreign ones, ``outside``: one rehearsal per dataset left out."""
    known_B = np.concatenate([one.signal_B for one in inside]).astype(np.float64)
    weight, bias = _scale(known_B, np.concatenate([one.signal_B for one in outside]) if outside else None)
    cut_Q = np.quantile(known_B, _SHARES)
    cut_Q[0] -= _MARGIN * known_B.std()
    chosen = _USUAL
    if outside:
        gain_Q = np.array([_gain(inside, cut) for cut in cut_Q])
        gain_GQ = np.array([[_gain([one], cut) for cut in cut_Q] for one in outside if len(one.gain_B)])
        better_GQ = gain_GQ - gain_GQ[:, _USUAL : _USUAL + 1]
        error_Q = better_GQ.std(axis=0, ddof=1) / np.sqrt(len(better_GQ))
        better_Q = gain_Q - gain_Q[_USUAL] + better_GQ.mean(axis=0)
        sure_Q = better_Q > _BEYOND_DOUBT * error_Q
        if sure_Q.any():
            chosen = int(np.where(sure_Q, better_Q, -np.inf).argmax())
    gate = Gate(weight=weight, bias=bias, threshold=0.0)
    return replace(gate, threshold=float(gate.familiarity(cut_Q[chosen : chosen + 1].astype(np.float32))[0]))


def _gain(rehearsals: Sequence[Rehearsal], cut: float) -> float:
    gain_B = np.concatenate([np.where(one.signal_B < cut, 0.0, one.gain_B) for one in rehearsals])
    return float(gain_B.mean())


def _scale(known_B: Doubles, foreign_B: Floats | None) -> tuple[float, float]:
    """Weight and bias that turn the signal into a familiarity of 0..1: how surely it tells known kinds from foreign ones."""
    spread = float(known_B.std()) + 1e-6
    if foreign_B is None:
        return 1.0 / spread, -float(np.quantile(known_B, 0.05)) / spread
    together = np.concatenate([known_B, foreign_B])[:, None] / spread
    model = LogisticRegression(class_weight="balanced").fit(together, np.arange(len(together)) < len(known_B))
    # A signal that tells nothing apart, or the wrong way round, still orders prompts by how sure the heads are.
    weight = max(float(model.coef_[0, 0]), 0.1) / spread
    bias = float(model.intercept_[0]) if weight * spread > 0.1 else -weight * float(np.median(known_B))
    return weight, bias
