"""What a weight of cost comes to: the experts worth having under it, its average cost and score (control speed, offline).

Must not know: embeddings, gates' making.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.assessment import Assessment, Floats, Gate, Ints

Doubles = npt.NDArray[np.float64]

TIE_WEIGHT = 1e-6  # of cost in every policy: among experts of equal score the cheaper serves
_WEIGHTS = (
    *(TIE_WEIGHT, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15),
    *(0.18, 0.2, 0.22, 0.24, 0.26, 0.32, 0.4, 0.55, 0.8, 1.5),
)
_BALANCED_LOSS = 0.004  # balanced: this much below the best quality
_BALANCED_DOUBT = 0.001  # and no more than this against quality, row by row, at 95 %
# What a named policy may lose on left-out datasets at 95 %: against the general expert or, where quality may lose more, against it.
_ALLOWED_HARM = 0.002
# What cheap may lose to the plain router, row by row, at 95 %: what quality may have lost to it, and what cheap loses to quality.
_ALLOWED_PLAIN = 0.0015
_COST_FROM = (0.2, 0.4, 0.6, 0.8)  # shares of known prompts that are too unfamiliar for cost to count
_NEVER = 2.0  # above any familiarity
_SURE = 1.96  # standard errors
_ROUNDING = 1e-9  # of a mean score


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A cost weight, and what it gave on rows that the models had not seen."""

    weight: float  # score given up for the most expensive expert against a free one
    avg_cost: float  # in the experts' cost unit
    score: float
    experts: tuple[int, ...]  # the experts that are worth having at this weight
    cost_from: float = 0.0  # familiarity from which cost counts
    leads: float = 1.0  # share that counts of the leads that are asked of experts
    harmless: bool = True  # on left-out datasets no worse than the general expert or than quality, within what is allowed
    lost: float = 0.0  # score against the first point, row by row, that may be lost at 95 %
    lost_plain: float = -1.0  # the same against the plain router; -1 without one, since then nothing is lost to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """Rows of a dataset as a model sees them that has not seen it, and the expert that this model holds for the best."""

    found: Assessment
    scores_BM: Doubles
    general: int


def pick(
    found: Assessment,
    gate: Gate,
    general: int,
    cost_term_M: Doubles,
    experts: Sequence[int],
    cost_from: float = 0.0,
    leads: float = 1.0,
) -> Ints:
    """The expert of each prompt: the best of ``experts`` after cost, or the general one where the gate closes.

    Cost counts from familiarity ``cost_from`` on; below, all but ties (``TIE_WEIGHT``) go to who is expected to be best.
    """
    allowed = np.array(sorted(experts), np.int64)
    counts_B1 = (found.familiarity_B >= np.float32(cost_from))[:, None]
    tie_M = np.minimum(cost_term_M, TIE_WEIGHT * cost_term_M / max(float(cost_term_M.max()), TIE_WEIGHT))
    chosen = allowed[(found.net(leads) - np.where(counts_B1, cost_term_M, tie_M))[:, allowed].argmax(axis=1)]
    result: Ints = np.where(found.familiarity_B < np.float32(gate.threshold), general, chosen)
    return result


def worthy_experts(
    expected_BM: Floats, scores_BM: Doubles, category_B: Ints, cost_term_M: Doubles, general: int, worth_having: float
) -> tuple[int, ...]:
    """The experts that, in at least one category, bring ``worth_having`` after cost; the general one always stays.

    One after the other, the expert whose absence costs least in the category that would miss it most is let go while that is less
    than ``worth_having``: near-ties flip with a word and earn nothing, and who is never picked costs nothing to lose. Measured
    per category, so that a small category keeps the expert that only it needs. What its absence costs is the greater of what is
    expected and what these rows show: an expert is let go where neither speaks for it, not because a few rows went against it.
    """
    after_BM = expected_BM - cost_term_M
    value_BM = scores_BM - cost_term_M
    row = np.arange(len(scores_BM))
    categories, place_B = np.unique(category_B, return_inverse=True)
    size_C = np.bincount(place_B)
    experts = np.unique(np.append(after_BM.argmax(axis=1), general))
    while len(experts) > 1:
        open_BE = after_BM[:, experts]
        first_B = open_BE.argmax(axis=1)
        top_B = open_BE[row, first_B]
        open_BE[row, first_B] = -np.inf
        second_B = open_BE.argmax(axis=1)
        shown_EC = np.zeros((len(experts), len(categories)))
        np.add.at(shown_EC, (first_B, place_B), value_BM[row, experts[first_B]] - value_BM[row, experts[second_B]])
        expected_EC = np.zeros_like(shown_EC)
        np.add.at(expected_EC, (first_B, place_B), top_B - open_BE[row, second_B])
        most_E = (np.maximum(shown_EC, expected_EC) / size_C).max(axis=1)
        most_E[experts == general] = np.inf
        least = int(most_E.argmin())
        if most_E[least] >= worth_having:
            break
        experts = np.delete(experts, least)
    return tuple(int(m) for m in experts)


def frontier(
    found: Assessment,
    scores_BM: Doubles,
    category_B: Ints,
    costs_M: Doubles,
    general: int,
    gate: Gate,
    worth_having: float,
    foreign: Sequence[Foreign] = (),
    plain_B: Doubles | None = None,
) -> tuple[FrontierPoint, ...]:
    """Points for each of a fixed row of cost weights; the first one is as good as free of cost.

    ``plain_B`` are the plain router's scores.

    Where a weight does harm on left-out datasets, there is a second point at which cost counts only for the more familiar prompts:
    the least familiarity of a few from which it does none. Lesser weights have a point there too where that does no harm: else
    nothing would be milder than it and still save. All of these are there once more without the leads that are asked of experts:
    a lead out of reach leaves cost nothing to choose from.
    """
    row = np.arange(len(scores_BM))
    from_Q = [0.0, *(float(q) for q in np.quantile(found.familiarity_B, _COST_FROM)), _NEVER]
    weighed: list[_Weighed] = []
    quality_B: Doubles | None = None  # gains of the first point on foreign rows: no policy has to be better than quality is
    group_B = np.repeat(np.arange(len(foreign)), [len(part.scores_BM) for part in foreign])

    def harmless(one: _Weighed, cost_from: float) -> bool:
        gain_B = _gains(foreign, gate, one, cost_from)
        if _lower_bound(gain_B, group_B) >= -_ALLOWED_HARM or quality_B is None:
            return True
        # Row by row too: on few rows quality's own bound is low by doubt alone, and would let everything pass.
        least = _lower_bound(quality_B, group_B)
        return _lower_bound(gain_B, group_B) >= least and _lower_bound(gain_B - quality_B, group_B) >= -_ALLOWED_HARM

    for leads, weight in itertools.product((1.0, 0.0), _WEIGHTS):
        term = weight * costs_M / costs_M.max()
        experts = worthy_experts(found.net(leads), scores_BM, category_B, term, general, worth_having)
        # Who is expected to be best, where cost does not count, is among those worth having without cost.
        familiar = tuple(sorted({*experts, *(weighed[0].experts if weighed else ())}))
        one = _Weighed(weight=weight, leads=leads, term=term, experts=experts, familiar=familiar)
        one.harmless_from.extend(next(([start] for start in from_Q if harmless(one, start)), []))
        if quality_B is None:
            quality_B = _gains(foreign, gate, one, 0.0)
        weighed.append(one)
    points: list[FrontierPoint] = []
    best_B = np.zeros(len(scores_BM))
    for i, one in enumerate(weighed):
        least = one.harmless_from[0] if one.harmless_from and i else _NEVER
        greater = {
            cost_from
            for other in weighed[i + 1 :]
            if other.leads == one.leads
            for cost_from in other.harmless_from[:1]
            if cost_from < _NEVER
        }
        for cost_from in sorted(cost_from for cost_from in greater if cost_from > least):
            if harmless(one, cost_from):
                one.harmless_from.append(cost_from)
        for cost_from in sorted({0.0, *one.harmless_from}):
            chosen = pick(found, gate, general, one.term, one.open_to(cost_from), cost_from, one.leads)
            score_B = scores_BM[row, chosen]
            best_B = score_B if not points else best_B
            points.append(
                FrontierPoint(
                    weight=one.weight,
                    avg_cost=float(costs_M[chosen].mean()),
                    score=float(score_B.mean()),
                    experts=tuple(int(m) for m in np.unique(np.append(chosen, general))),
                    cost_from=cost_from,
                    leads=one.leads,
                    harmless=cost_from in one.harmless_from,
                    lost=-_lower_bound(score_B - best_B),
                    lost_plain=-1.0 if plain_B is None else -_lower_bound(score_B - plain_B),
                )
            )
    return tuple(points)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weighed:
    """A weight of cost, the experts worth having under it, and familiarities from which it does no harm, the least first."""

    weight: float
    leads: float
    term: Doubles
    experts: tuple[int, ...]
    familiar: tuple[int, ...]  # open where cost counts for some prompts only
    harmless_from: list[float] = field(default_factory=list)

    def open_to(self, cost_from: float) -> tuple[int, ...]:
        return self.experts if cost_from == 0.0 else self.familiar


def _gains(foreign: Sequence[Foreign], gate: Gate, one: _Weighed, cost_from: float) -> Doubles:
    """Each row's score over the general expert's, on rows of left-out datasets; none without any."""
    gains = [np.zeros(0)]
    for part in foreign:
        chosen = pick(part.found, gate, part.general, one.term, one.open_to(cost_from), cost_from, one.leads)
        gains.append(part.scores_BM[np.arange(len(chosen)), chosen] - part.scores_BM[:, part.general])
    return np.concatenate(gains)


def _lower_bound(gain_B: Doubles, group_B: Ints | None = None) -> float:
    """Of a mean at 95 %, 0 without any rows; rows count as independent, or as no more so than their groups show them to be.

    Gains differ far more between datasets than within: rows of a few that went well say little of the next one.
    """
    if not len(gain_B):
        return 0.0
    error = float(gain_B.std() / np.sqrt(len(gain_B)))
    if group_B is not None and (num := int(group_B.max()) + 1) > 1:
        rest_G = np.bincount(group_B, gain_B - gain_B.mean())
        error = max(error, float(np.sqrt((rest_G**2).sum() * num / (num - 1)) / len(gain_B)))
    return float(gain_B.mean()) - _SURE * error


def policies_of(points: Sequence[FrontierPoint], best_single: float) -> dict[str, int]:
    """The point of each policy.

    quality has no cost; balanced is the cheapest that loses no more than its policy allows, beyond doubt, nor more for what it
    saves than cheap does; cheap the cheapest that is as good as the best single expert, or as balanced where that is less, and
    that spends, beyond doubt, no more than quality is ahead of what may be lost to the plain router: never the dearer of the two,
    on these rows nor, since in balanced cost weighs no more and for no prompt that it doesn't weigh for in cheap, on others.
    Only points that do no harm on left-out datasets are looked at.

    What a point lost to the plain router is not asked of these rows alone: of many points the cheapest that seems to have lost
    little is the luckiest. So what quality may have lost and what the point lost to quality add up, both beyond doubt.
    """
    least = points[0].score - _BALANCED_LOSS
    left = max(0.0, _ALLOWED_PLAIN - points[0].lost_plain)
    surely = [i for i, point in enumerate(points) if not i or (point.lost <= left and point.lost_plain <= _ALLOWED_PLAIN)]
    cheap = surely[cheapest([points[i] for i in surely], min(best_single, least))]
    weight, cost_from = points[cheap].weight, points[cheap].cost_from
    saved = points[0].avg_cost - points[cheap].avg_cost
    rate = (points[0].score - points[cheap].score) / saved if saved > 0.0 else 0.0
    milder = [0]  # in quality cost weighs for no prompt at all
    for i, point in enumerate(points[1:], 1):
        worth = points[0].score - point.score <= rate * (points[0].avg_cost - point.avg_cost) + _ROUNDING
        alike = point.leads == points[cheap].leads or point.leads == 1.0
        if worth and alike and point.lost <= _BALANCED_DOUBT and point.weight <= weight and point.cost_from >= cost_from:
            milder.append(i)
    balanced = milder[cheapest([points[i] for i in milder], least)]
    return {"quality": 0, "balanced": balanced, "cheap": cheap}


def cheapest(points: Sequence[FrontierPoint], at_least: float) -> int:
    """The cheapest harmless point with a score of ``at_least``; the best one when there is none."""
    harmless = [i for i, point in enumerate(points) if point.harmless]  # never empty: the points that policies are of hold one
    good = [i for i in harmless if points[i].score >= at_least]
    if not good:
        return max(harmless, key=lambda i: (points[i].score, -points[i].avg_cost))
    return min(good, key=lambda i: (points[i].avg_cost, -points[i].score, i))
