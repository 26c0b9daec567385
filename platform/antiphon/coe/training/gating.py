"""Chooses when the router departs from the plain router's pick, and when from the general expert (control speed, offline).

On prompts of known kinds the plain router is hard to beat, on foreign ones the general expert often is: leads over either that
are nothing but noise cost more than they bring. So a departure has to be proven, on models that had not seen the prompts: those of
inner folds stand for known kinds, those that had one more dataset left out for foreign ones. A gain is counted by half, since it is
the best of several that were looked at, and less twice its standard error. How careful to be with strange prompts is not looked
for at all: the best of many degrees is the luckiest. There is one, and less only where known prompts can't afford it. Must not
know: embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from antiphon.coe.routing.assessment import Floats, Gate

Doubles = npt.NDArray[np.float64]

OPEN = Gate(weight=1.0, bias=0.0, threshold=0.0)
NEVER = 1.0  # a lead that nothing reaches: scores are 0..1
# Expected scores by which another expert must be ahead of the plain router's pick, on familiar prompts.
_HOLDS = (0.0, 0.02, 0.04, 0.08, NEVER)
_COUNTED = 0.5  # share of a gain that is counted
_SURE = 1.96  # standard errors
# What known prompts may lose to the plain router, at 95 %, so that foreign ones are safe. Of few prompts that is nearly nothing but
# doubt: there, the router is hardly careful at all, and close to the plain one.
_MAY_LOSE = 0.006
_LIKELY = 0.9  # how likely the next foreign dataset must be to gain for foreign prompts to be routed as known ones are
_NOTHING_LIKE_IT = 0.005  # share of prompts that the gate closes on where foreign ones are routed as known ones are


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Prompts of a dataset or fold as a model saw them that had not learnt from them.

    Groups of experts, by row: the plain router's pick and general, the pick, general, neither.
    """

    signal_B: Floats  # the gate's
    expected_4B: Doubles  # of the best expert of each group; far below any where it is empty
    score_4B: Doubles  # what that expert scored
    plain_B: Doubles  # what the plain router's pick scored
    general_B: Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class _Degree:
    """How careful the router is with what is strange."""

    strange: float  # share of known prompts that are strange at all
    caution: float  # expected score by which others must be ahead of the general expert, on the strangest
    closed: float  # share of known prompts that the gate may close on


# The most careful degree that known prompts can afford is taken.
_DEGREES = (
    _Degree(strange=0.25, caution=0.12, closed=0.02),
    _Degree(strange=0.12, caution=0.12, closed=0.005),
    _Degree(strange=0.04, caution=0.12, closed=0.002),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The gate, and the leads over the plain router's pick."""

    gate: Gate
    hold: float
    strange_hold: float


def rehearsed(
    expected_BM: Floats, behind_BM: npt.NDArray[np.bool_], general: int, scores_BM: Doubles, plain_B: Doubles, signal_B: Floats
) -> Rehearsal:
    """A rehearsal of expected scores without leads, and of what all experts and the plain router's pick scored."""
    row, is_general_M = np.arange(len(expected_BM)), np.arange(expected_BM.shape[1]) == general
    best, scored = [], []
    for behind, is_general in ((False, True), (False, False), (True, True), (True, False)):
        inside_BM = (behind_BM == behind) & (is_general_M == is_general)
        group_BM = np.where(inside_BM, expected_BM, -10.0)
        first_B = group_BM.argmax(axis=1)
        best.append(group_BM[row, first_B].astype(np.float64))
        scored.append(scores_BM[row, first_B])
    return Rehearsal(
        signal_B=signal_B,
        expected_4B=np.stack(best),
        score_4B=np.stack(scored),
        plain_B=plain_B,
        general_B=scores_BM[:, general],
    )


def scale_of(inside: Sequence[Floats], outside: Sequence[Floats]) -> Gate:
    """An open gate with the scale of familiarity, by the signals of known prompts and of foreign ones."""
    known_B = np.concatenate(inside).astype(np.float64)
    weight, bias = _scale(known_B, np.concatenate(outside) if outside else None)
    return Gate(weight=weight, bias=bias, threshold=0.0)


def choose_departure(scale: Gate, inside: Sequence[Rehearsal], outside: Sequence[Rehearsal]) -> Departure:
    """When to depart, by prompts of known kinds, ``inside``, and of foreign ones, ``outside``: one rehearsal per dataset left out.

    First the lead on familiar prompts: the one whose gain over the plain router is proven and greatest, else none is in reach.
    Where the next foreign dataset may be expected to gain by that too, foreign prompts are routed as known ones are, and the gate
    closes on what is stranger than almost all of them. Else the most careful degree by which known prompts lose no more than they
    may; if there is none, the gate closes on what is stranger than all that is known. ``scale`` is open and has the scale of
    familiarity.
    """
    outside = [one for one in outside if len(one.plain_B)]
    known = _joined(inside)
    known_B = scale.familiarity(known.signal_B)
    hold, best = NEVER, 0.0
    for one in _HOLDS[:-1]:
        mean, error = _mean(_gain(known, Departure(gate=scale, hold=one, strange_hold=one)).over_plain_B)
        if _COUNTED * mean >= _SURE * error and mean > best:
            hold, best = one, mean
    if outside:
        strangest = [np.quantile(one, _NOTHING_LIKE_IT) for one in (known_B, scale.familiarity(_joined(outside).signal_B))]
        alike = Departure(gate=replace(scale, threshold=float(min(strangest))), hold=hold, strange_hold=hold)
        if _helps(alike, outside):
            return alike
    for degree in _DEGREES:
        gate = replace(
            scale,
            threshold=float(np.quantile(known_B, degree.closed)),
            caution=degree.caution,
            caution_below=max(float(np.quantile(known_B, degree.strange)), 1e-6),
        )
        careful = Departure(gate=gate, hold=hold, strange_hold=0.0)
        mean, error = _mean(_gain(known, careful).over_plain_B)
        if mean - _SURE * error >= -_MAY_LOSE:
            return careful
    return Departure(gate=replace(scale, threshold=float(known_B.min())), hold=hold, strange_hold=hold)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gain:
    """What a departure gains, row by row, over the plain router and over the general expert."""

    over_plain_B: Doubles
    over_general_B: Doubles


def _helps(departure: Departure, outside: Sequence[Rehearsal]) -> bool:
    """Whether the next foreign dataset can be expected to gain over the general expert: a prediction interval (Student's t).

    Not whether the mean over datasets is a gain: datasets differ far more than rows do, and where one of ten loses by tens of
    points the mean may well be beyond doubt, and the next one lost.
    """
    gain_G = np.array([_gain(one, departure).over_general_B.mean() for one in outside])
    if (num := len(gain_G)) < 2:
        return False
    spread = float(gain_G.std(ddof=1)) * np.sqrt(1.0 + 1.0 / num)
    return bool(gain_G.mean() > student.ppf(_LIKELY, num - 1) * spread)


def _gain(rehearsal: Rehearsal, one: Departure) -> _Gain:
    familiarity_B = one.gate.familiarity(rehearsal.signal_B)
    strange_B = one.gate.strangeness(familiarity_B).astype(np.float64)
    hold_B = np.where(strange_B > 0.0, one.strange_hold, one.hold)
    caution_B = one.gate.caution * strange_B
    both, pick, general, neither = rehearsal.expected_4B
    chosen_B = np.stack([both, pick - caution_B, general - hold_B, neither - hold_B - caution_B]).argmax(axis=0)
    score_B = rehearsal.score_4B[chosen_B, np.arange(len(chosen_B))]
    score_B = np.where(familiarity_B < np.float32(one.gate.threshold), rehearsal.general_B, score_B)
    return _Gain(over_plain_B=score_B - rehearsal.plain_B, over_general_B=score_B - rehearsal.general_B)


def _mean(gain_B: Doubles) -> tuple[float, float]:
    return float(gain_B.mean()), float(gain_B.std() / np.sqrt(len(gain_B)))


def _joined(rehearsals: Sequence[Rehearsal]) -> Rehearsal:
    return Rehearsal(
        signal_B=np.concatenate([np.zeros(0, np.float32), *(one.signal_B for one in rehearsals)]),
        expected_4B=np.concatenate([np.zeros((4, 0)), *(one.expected_4B for one in rehearsals)], axis=1),
        score_4B=np.concatenate([np.zeros((4, 0)), *(one.score_4B for one in rehearsals)], axis=1),
        plain_B=np.concatenate([np.zeros(0), *(one.plain_B for one in rehearsals)]),
        general_B=np.concatenate([np.zeros(0), *(one.general_B for one in rehearsals)]),
    )


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
