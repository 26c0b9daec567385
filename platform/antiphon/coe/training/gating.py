"""Chooses below which familiarity the general expert serves, and how cautious routing is above it (control speed, offline).

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
# Expected scores by which another expert must be ahead of the general one at a familiarity of 0; nothing is asked from the median
# of known prompts on. A lead of this size is what class means of some hundred prompts differ by when nothing is behind it.
_CAUTIONS = (0.0, 0.06, 0.12)
_USUAL_CAUTION = 1
# Standard errors, over datasets left out. Gains differ far more between datasets than within: a best share that is taken for
# granted is the best for the datasets at hand, and a bad one for the next.
_BEYOND_DOUBT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Prompts that a model had not seen: the gate's signal, and how far its pick is ahead of the general expert."""

    signal_B: Floats
    ahead_B: Doubles  # in expected score
    gain_B: Doubles  # in score


def scale_of(inside: Sequence[Floats], outside: Sequence[Floats]) -> Gate:
    """An open gate with the scale of familiarity, by the signals of known prompts and of foreign ones."""
    known_B = np.concatenate(inside).astype(np.float64)
    weight, bias = _scale(known_B, np.concatenate(outside) if outside else None)
    gate = Gate(weight=weight, bias=bias, threshold=0.0)
    return replace(gate, caution_below=float(np.median(gate.familiarity(known_B.astype(np.float32)))))


def choose_gate(gate: Gate, inside: Sequence[Rehearsal], outside: Sequence[Rehearsal]) -> Gate:
    """The gate by prompts of known kinds, ``inside``, and of foreign ones, ``outside``: one rehearsal per dataset left out.

    ``gate`` is open and has the scale.
    """
    known_B = np.concatenate([one.signal_B for one in inside]).astype(np.float64)
    cut_Q = np.quantile(known_B, _SHARES)
    cut_Q[0] -= _MARGIN * known_B.std()
    threshold_Q = gate.familiarity(cut_Q.astype(np.float32))
    shares = [replace(gate, threshold=float(threshold)) for threshold in threshold_Q]
    gate = shares[_best(shares, _USUAL, inside, outside)]
    cautions = [replace(gate, caution=caution) for caution in _CAUTIONS]
    return cautions[_best(cautions, _USUAL_CAUTION, inside, outside)]


def _best(gates: Sequence[Gate], usual: int, inside: Sequence[Rehearsal], outside: Sequence[Rehearsal]) -> int:
    """The gate that gains most on known and foreign prompts together, where it beats the usual one beyond doubt; else that one.

    The usual one presumes that routing harms foreign prompts. Where it gains there beyond doubt, under the usual one itself, that
    is refuted, and the best one is taken as it is.
    """
    datasets = [one for one in outside if len(one.gain_B)]
    if len(datasets) < 2:
        return usual
    gain_Q = np.array([_gain(inside, gate) for gate in gates])
    gain_GQ = np.array([[_gain([one], gate) for gate in gates] for one in datasets])
    better_GQ = gain_GQ - gain_GQ[:, usual : usual + 1]
    error_Q = better_GQ.std(axis=0, ddof=1) / np.sqrt(len(better_GQ))
    better_Q = gain_Q - gain_Q[usual] + better_GQ.mean(axis=0)
    gain_G = gain_GQ[:, usual]
    if gain_G.mean() > _BEYOND_DOUBT * gain_G.std(ddof=1) / np.sqrt(len(gain_G)):
        error_Q = np.zeros_like(error_Q)
    sure_Q = better_Q > _BEYOND_DOUBT * error_Q
    return int(np.where(sure_Q, better_Q, -np.inf).argmax()) if sure_Q.any() else usual


def _gain(rehearsals: Sequence[Rehearsal], gate: Gate) -> float:
    gains = []
    for one in rehearsals:
        familiarity_B = gate.familiarity(one.signal_B)
        open_B = (familiarity_B >= np.float32(gate.threshold)) & (one.ahead_B >= gate.lead(familiarity_B))
        gains.append(np.where(open_B, one.gain_B, 0.0))
    return float(np.concatenate(gains).mean())


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
