"""Judges a router recipe on a table: by prompt and by dataset, robustness, calibration, cost (control speed, offline).

No choice ever sees a judged row: every fold fits and tunes on its own rows. Must not know: documents, plots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.coe.judging.comparisons import COMPARISONS, ORACLE, SIMPLE, Rows, expected_scores
from antiphon.coe.routing.assessment import Assessment, Ints
from antiphon.coe.training.data.augment import PERTURBATIONS, perturbed
from antiphon.coe.training.encoders.sentences import encode_sentences
from antiphon.coe.training.encoders.topics import presence
from antiphon.coe.training.fit import Examples, Path, Recipe, folds_of
from antiphon.coe.training.frontier import TIE_WEIGHT, pick
from antiphon.coe.training.train import Memos, Prepared, Router, fit_router, slow_embedding

Doubles = npt.NDArray[np.float64]
Say = Callable[[str], None]

NUM_FOLDS = 5
NUM_BOOTSTRAPS = 2000
NUM_BINS = 15
_COST_WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.24, 0.26, 0.4, 0.6, 1.0, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of the quality-cost curve, on rows that nothing was fitted on."""

    weight: float
    avg_cost: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Scores of rows that nothing was fitted on. Arrays are per judged row; -1 stands for no category."""

    score_B: Doubles  # policy quality
    single_B: Doubles  # the score of the expert that is best on the fitted rows
    gated_B: npt.NDArray[np.bool_]
    slow_B: npt.NDArray[np.bool_]
    cost_B: Doubles
    expected_B: Doubles  # what the router expected of its pick
    category_B: Ints  # predicted
    confidence_B: Doubles
    policies: dict[str, tuple[Doubles, Doubles]]  # policy → score and cost per row
    simple_policies: dict[str, tuple[Doubles, Doubles]]  # policy → the simple router's score under it; utility over its per row
    comparisons: dict[str, Doubles]  # the simple router, nearest neighbours, ridge, oracle, random → score per row
    advantage_B: Doubles  # expected score of the best expert over the cheapest: what two models are told apart by
    comparison_advantages: dict[str, Doubles]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Everything that judging by prompt finds."""

    verdict: Verdict
    true_category_B: Ints
    curve: tuple[CurvePoint, ...]
    agreement: dict[str, Estimate]


def estimate(values_B: Doubles, seed: int) -> Estimate:
    """Mean and bootstrap interval."""
    source = np.random.default_rng(seed)
    num = len(values_B)
    means = np.array([values_B[source.integers(0, num, num)].mean() for _ in range(NUM_BOOTSTRAPS)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean=float(values_B.mean()), low=float(low), high=float(high))


def calibration_error(confidence_B: Doubles, right_B: npt.NDArray[np.bool_], num_bins: int = NUM_BINS) -> float:
    """Expected calibration error over equal-width bins."""
    bins = np.minimum((confidence_B * num_bins).astype(int), num_bins - 1)
    error = 0.0
    for b in range(num_bins):
        inside = bins == b
        if inside.any():
            error += inside.mean() * abs(float(confidence_B[inside].mean()) - float(right_B[inside].mean()))
    return float(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Prompts as both paths see them."""

    fast: Examples
    slow: Examples | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What serves: the slow path's assessment where the fast one was unsure."""

    expert_B: Ints
    gated_B: npt.NDArray[np.bool_]
    slow_B: npt.NDArray[np.bool_]
    category_B: Ints
    confidence_B: Doubles
    scores_BM: Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assessed:
    """Both paths' assessments of some rows, made once for all policies."""

    fast: Assessment
    slow: Assessment | None


def _assess(router: Router, asked: _Asked, rows: Ints) -> _Assessed:
    fast = router.fast.assess(asked.fast.features(rows, router.fast.spaces))
    if router.slow is None or asked.slow is None:
        return _Assessed(fast=fast, slow=None)
    return _Assessed(fast=fast, slow=router.slow.assess(asked.slow.features(rows, router.slow.spaces)))


def _serve(router: Router, found: _Assessed, point: int, weight: float, costs_M: Doubles) -> _Seen:
    """Route rows just as the service does."""
    term = weight * costs_M / costs_M.max()
    experts, cost_from = router.fast.frontier[point].experts, router.fast.frontier[point].cost_from
    leads = router.fast.frontier[point].leads
    expert_B = pick(found.fast, router.fast.gate, router.fast.general, term, experts, cost_from, leads)
    gated_B = found.fast.familiarity_B < np.float32(router.fast.gate.threshold)
    slow_B = np.zeros(len(gated_B), bool)
    categories_BC, scores_BM = found.fast.categories_BC, found.fast.scores_BM
    if router.slow is not None and found.slow is not None:
        slow_B = gated_B
        again_B = pick(found.slow, router.slow.gate, router.fast.general, term, experts, cost_from, leads)
        expert_B = np.where(slow_B, again_B, expert_B)
        gated_B = slow_B & (found.slow.familiarity_B < np.float32(router.slow.gate.threshold))
        categories_BC = np.where(slow_B[:, None], found.slow.categories_BC, categories_BC)
        scores_BM = np.where(slow_B[:, None], found.slow.scores_BM, scores_BM)
    return _Seen(
        expert_B=expert_B,
        gated_B=gated_B,
        slow_B=slow_B,
        category_B=categories_BC.argmax(axis=1),
        confidence_B=categories_BC.max(axis=1).astype(np.float64),
        scores_BM=scores_BM.astype(np.float64),
    )


def by_prompt(prepared: Prepared, recipe: Recipe, say: Say) -> Judged:
    """5-fold cross-validation by prompt."""
    num, scores_BM, costs_M = len(prepared.table), prepared.table.scores, prepared.table.params_b
    fold = folds_of(num, NUM_FOLDS, recipe.seed)
    memos = Memos.empty()
    parts = _Parts.of(prepared)
    curve = np.zeros((len(_COST_WEIGHTS), 2))
    agreed = {name: np.zeros(num) for name in PERTURBATIONS}
    plain = _Asked(fast=prepared.fast, slow=prepared.slow)
    changed = {name: _changed(prepared, perturbed(prepared.table.prompts, name, recipe.seed)) for name in PERTURBATIONS}
    for f in range(NUM_FOLDS):
        say(f"fold {f + 1} of {NUM_FOLDS}")
        seen, judged = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        router = fit_router(prepared, seen, recipe, memos)
        found = _assess(router, plain, judged)
        served = parts.put(router, found, seen, judged)
        for name, asked in changed.items():
            other = _serve(router, _assess(router, asked, judged), 0, TIE_WEIGHT, costs_M)
            agreed[name][judged] = other.expert_B == served.expert_B
        for w, weight in enumerate(_COST_WEIGHTS):
            expert_B = _serve(router, found, _nearest(router.fast, weight), max(weight, TIE_WEIGHT), costs_M).expert_B
            curve[w] += [costs_M[expert_B].sum(), scores_BM[judged, expert_B].sum()]
    return Judged(
        verdict=parts.verdict(),
        true_category_B=prepared.labels.category_B,
        curve=tuple(
            CurvePoint(weight=w, avg_cost=float(cost / num), score=float(score / num))
            for w, (cost, score) in zip(_COST_WEIGHTS, curve, strict=True)
        ),
        agreement={name: estimate(values, recipe.seed) for name, values in agreed.items()},
    )


_MIN_GROUPS = 3  # of which one is left out


def left_out_groups(prepared: Prepared) -> tuple[str, npt.NDArray[np.str_]] | None:
    """What is left out in turn, and each row's: its dataset; its category where there are too few datasets; None when of both."""
    labels = prepared.labels
    names = np.array([*labels.categories, "no category"])  # -1 is the last one
    for kind, group_B in (("dataset", prepared.fast.datasets), ("category", names[labels.category_B])):
        if len(set(group_B.tolist())) >= _MIN_GROUPS:
            return kind, group_B
    return None


def by_dataset(prepared: Prepared, recipe: Recipe, say: Say) -> Verdict | None:
    """Leave one dataset out, for each dataset, or one category where there are too few datasets; None when there are too few."""
    groups = left_out_groups(prepared)
    if groups is None:
        return None
    memos = Memos.empty()
    parts = _Parts.of(prepared)
    plain = _Asked(fast=prepared.fast, slow=prepared.slow)
    for name in sorted(set(groups[1].tolist())):
        say(f"without {name}")
        seen, judged = np.flatnonzero(groups[1] != name), np.flatnonzero(groups[1] == name)
        router = fit_router(prepared, seen, recipe, memos)
        parts.put(router, _assess(router, plain, judged), seen, judged)
    return parts.verdict()


@dataclass(slots=True)
class _Parts:
    """A verdict under construction."""

    prepared: Prepared
    arrays: dict[str, Doubles]

    @classmethod
    def of(cls, prepared: Prepared) -> _Parts:
        return cls(prepared=prepared, arrays={})

    def put(self, router: Router, found: _Assessed, seen: Ints, rows: Ints) -> _Seen:
        """What a router that learnt from ``seen`` does with ``rows``, and what the comparisons do."""
        table = self.prepared.table
        scores_BM, costs_M = table.scores, table.params_b
        general = router.fast.general
        # Which of them is the strong one is the table's to say: a fold that says otherwise would turn its rows' order round.
        strong, weak = int(scores_BM.mean(axis=0).argmax()), int(costs_M.argmin())
        weak = weak if weak != strong else int(scores_BM.mean(axis=0).argmin())
        served = _serve(router, found, 0, TIE_WEIGHT, costs_M)
        own = np.arange(len(rows))
        self._set("score", rows, scores_BM[rows, served.expert_B])
        self._set("single", rows, scores_BM[rows, general])
        self._set("gated", rows, served.gated_B)
        self._set("slow", rows, served.slow_B)
        self._set("cost", rows, costs_M[served.expert_B])
        self._set("expected", rows, served.scores_BM[own, served.expert_B])
        self._set("category", rows, served.category_B)
        self._set("confidence", rows, served.confidence_B)
        self._set("advantage", rows, served.scores_BM[:, strong] - served.scores_BM[:, weak])
        fast = self.prepared.fast
        compared = Rows(
            prompts=table.prompts,
            embedding_BD=fast.embedding_BD,
            num_near=fast.num_near,
            label_B=self.prepared.labels.source_B if self.prepared.labels.how != "clusters" else np.zeros(len(table), np.int64),
            scores_BM=scores_BM,
        )
        for name in COMPARISONS:
            expected_BM = expected_scores(name, compared, seen, rows)
            if name == SIMPLE:
                self._put_policies(router, found, rows, expected_BM)
            self._set(f"comparison {name}", rows, scores_BM[rows, expected_BM.argmax(axis=1)])
            self._set(f"comparison advantage {name}", rows, expected_BM[:, strong] - expected_BM[:, weak])
        self._set(f"comparison {ORACLE}", rows, scores_BM[rows].max(axis=1))
        self._set("comparison random", rows, scores_BM[rows].mean(axis=1))
        return served

    def _put_policies(self, router: Router, found: _Assessed, rows: Ints, simple_BM: Doubles) -> None:
        """Each policy's picks, and those of the simple router under the same policy: the same cost, for the same prompts."""
        scores_BM, costs_M = self.prepared.table.scores[rows], self.prepared.table.params_b
        own = np.arange(len(rows))
        for policy, point in router.policies.items():
            weight, cost_from = router.fast.frontier[point].weight, router.fast.frontier[point].cost_from
            expert_B = _serve(router, found, point, weight, costs_M).expert_B
            counts_B1 = (found.fast.familiarity_B >= np.float32(cost_from))[:, None]
            cost_BM = np.where(counts_B1, weight, TIE_WEIGHT) * (costs_M / costs_M.max())
            simple_B = (simple_BM - cost_BM).argmax(axis=1)
            self._set(f"policy {policy}", rows, scores_BM[own, expert_B])
            self._set(f"policy cost {policy}", rows, costs_M[expert_B])
            self._set(f"policy simple {policy}", rows, scores_BM[own, simple_B])
            self._set(f"policy utility {policy}", rows, (scores_BM - cost_BM)[own, expert_B] - (scores_BM - cost_BM)[own, simple_B])

    def _set(self, name: str, rows: Ints, values_B: npt.NDArray[Any]) -> None:
        if name not in self.arrays:
            self.arrays[name] = np.zeros(len(self.prepared.table))
        self.arrays[name][rows] = values_B

    def _named(self, prefix: str) -> dict[str, Doubles]:
        return {name.removeprefix(prefix): values for name, values in self.arrays.items() if name.startswith(prefix)}

    def verdict(self) -> Verdict:
        """The whole, once every row has been judged."""
        a = self.arrays
        costs = self._named("policy cost ")
        return Verdict(
            score_B=a["score"],
            single_B=a["single"],
            gated_B=a["gated"] > 0,
            slow_B=a["slow"] > 0,
            cost_B=a["cost"],
            expected_B=a["expected"],
            category_B=a["category"].astype(np.int64),
            confidence_B=a["confidence"],
            policies={name: (a[f"policy {name}"], cost_B) for name, cost_B in costs.items()},
            simple_policies={name: (a[f"policy simple {name}"], a[f"policy utility {name}"]) for name in costs},
            comparisons={name: v for name, v in self._named("comparison ").items() if not name.startswith("advantage ")},
            advantage_B=a["advantage"],
            comparison_advantages=self._named("comparison advantage "),
        )


def _changed(prepared: Prepared, prompts: list[str]) -> _Asked:
    fast_BD = prepared.embedding.encode_all(prompts)
    present = presence(prepared.embedding, prompts)
    counts = prepared.fast.counts.of(prepared.embedding, prompts)
    fast = replace(prepared.fast, embedding_BD=fast_BD, present_BW=present, counts=counts)
    if prepared.slow is None or prepared.encoder is None:
        return _Asked(fast=fast, slow=None)
    slow_BD = slow_embedding(encode_sentences(prepared.encoder, prompts), fast_BD)
    return _Asked(fast=fast, slow=replace(prepared.slow, embedding_BD=slow_BD, present_BW=present, counts=counts))


def _nearest(path: Path, weight: float) -> int:
    """The point of the nearest weight at which cost always counts, and leads only where it doesn't."""
    leads = 1.0 if weight == 0.0 else 0.0
    plain = [i for i, point in enumerate(path.frontier) if point.cost_from == 0.0 and point.leads == leads]
    return min(plain, key=lambda i: abs(path.frontier[i].weight - weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoModels:
    """Metrics of a table with one weak and one strong expert."""

    apgr: float  # average share of the gap between weak and strong that is recovered, over all shares of strong calls
    cpt_50: float  # share of strong calls that recovers half of the gap
    cpt_80: float


def two_models(advantage_B: Doubles, scores_BM: Doubles, weak: int, strong: int) -> TwoModels:
    """Sweep the share of prompts that go to the strong expert, by predicted advantage, largest first."""
    order = np.argsort(-advantage_B, kind="stable")
    gains = scores_BM[order, strong] - scores_BM[order, weak]
    recovered = np.concatenate([[0.0], np.cumsum(gains)]) / max(1e-12, float(gains.sum()))
    share = np.linspace(0.0, 1.0, len(recovered))
    middle = (recovered[1:] + recovered[:-1]) / 2

    def share_for(part: float) -> float:
        return float(share[int(np.argmax(recovered >= part))]) if (recovered >= part).any() else 1.0

    return TwoModels(apgr=float(middle.mean()), cpt_50=share_for(0.5), cpt_80=share_for(0.8))


def aiq(points: list[tuple[float, float]]) -> float:
    """Mean score under the non-decreasing upper hull of (cost, score) points, over the costs they span."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points):
        while best and best[-1][0] == cost and best[-1][1] <= score:
            best.pop()
        if best and score <= best[-1][1]:
            continue
        while len(best) >= 2:
            (x0, y0), (x1, y1) = best[-2], best[-1]
            if (y1 - y0) * (cost - x0) > (score - y0) * (x1 - x0):
                break
            best.pop()
        best.append((cost, score))
    highest = max(cost for cost, _ in points)
    if best[-1][0] < highest:
        best.append((highest, best[-1][1]))
    if len(best) == 1:
        return best[0][1]
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(best))
    return area / (best[-1][0] - best[0][0])
