"""Judges a router recipe on a table: by prompt and by dataset, robustness, calibration, cost (control speed, offline).

No choice ever sees a judged row: every fold fits and tunes on its own rows. Must not know: documents, plots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import Ridge

from antiphon.coe.routing.assessment import Assessment, Floats, Ints
from antiphon.coe.training.augment import PERTURBATIONS, perturbed
from antiphon.coe.training.fit import Path, Recipe, folds_of, pick
from antiphon.coe.training.sentences import encode_sentences
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

    score_B: Doubles
    single_B: Doubles  # the score of the expert that is best on the fitted rows
    gated_B: npt.NDArray[np.bool_]
    slow_B: npt.NDArray[np.bool_]
    cost_B: Doubles
    category_B: Ints  # predicted
    confidence_B: Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Everything that judging by prompt finds."""

    verdict: Verdict
    true_category_B: Ints
    curve: tuple[CurvePoint, ...]
    agreement: dict[str, Estimate]
    baselines: dict[str, Doubles]  # name → score per row


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
class _Seen:
    """The assessment that serves: the slow path's where the fast one was unsure."""

    expert_B: Ints
    gated_B: npt.NDArray[np.bool_]
    slow_B: npt.NDArray[np.bool_]
    category_B: Ints
    confidence_B: Doubles


def _serve(router: Router, fast_BD: Floats, slow_BD: Floats | None, point: int, weight: float, costs_M: Doubles) -> _Seen:
    """Route rows just as the service does."""
    found = router.fast.assess(fast_BD)
    term = weight * costs_M / costs_M.max()
    experts = router.fast.frontier[point].experts
    expert_B = pick(found, router.fast.gate, router.fast.general, term, experts)
    gated_B = found.familiarity_B < router.fast.gate.threshold
    slow_B = np.zeros(len(gated_B), bool)
    categories_BC = found.categories_BC.copy()
    if router.slow is not None and slow_BD is not None and gated_B.any():
        slow_B = gated_B.copy()
        again = router.slow.assess(slow_BD[slow_B])
        expert_B[slow_B] = pick(again, router.slow.gate, router.fast.general, term, experts)
        gated_B = gated_B.copy()
        gated_B[slow_B] = again.familiarity_B < router.slow.gate.threshold
        categories_BC[slow_B] = again.categories_BC
    return _Seen(
        expert_B=expert_B,
        gated_B=gated_B,
        slow_B=slow_B,
        category_B=categories_BC.argmax(axis=1),
        confidence_B=categories_BC.max(axis=1).astype(np.float64),
    )


def by_prompt(prepared: Prepared, recipe: Recipe, say: Say) -> Judged:
    """5-fold cross-validation by prompt."""
    num, scores_BM, costs_M = len(prepared.table), prepared.table.scores, prepared.table.params_b
    fold = folds_of(num, NUM_FOLDS, recipe.seed)
    memos = Memos.empty()
    parts = _Parts.of(num)
    curve = np.zeros((len(_COST_WEIGHTS), 2))
    agreed = {name: np.zeros(num) for name in PERTURBATIONS}
    baselines = {name: np.zeros(num) for name in ("kNN-100", "ridge", "random")}
    changed = {name: _embedded(prepared, perturbed(prepared.table.prompts, name, recipe.seed)) for name in PERTURBATIONS}
    for f in range(NUM_FOLDS):
        say(f"fold {f + 1} of {NUM_FOLDS}")
        seen, judged = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        router = fit_router(prepared, seen, recipe, memos)
        plain = _rows(prepared, judged)
        served = _serve(router, *plain, 0, 0.0, costs_M)
        parts.put(judged, served, router.fast.general, scores_BM, costs_M)
        for name, embedded in changed.items():
            other = _serve(router, *_taken(embedded, judged), 0, 0.0, costs_M)
            agreed[name][judged] = other.expert_B == served.expert_B
        for w, weight in enumerate(_COST_WEIGHTS):
            point = _nearest(router.fast, weight)
            expert_B = _serve(router, *plain, point, weight, costs_M).expert_B
            curve[w] += [costs_M[expert_B].sum(), scores_BM[judged, expert_B].sum()]
        _baselines(prepared, seen, judged, baselines)
    return Judged(
        verdict=parts.verdict(),
        true_category_B=prepared.labels.category_B,
        curve=tuple(
            CurvePoint(weight=w, avg_cost=float(cost / num), score=float(score / num))
            for w, (cost, score) in zip(_COST_WEIGHTS, curve, strict=True)
        ),
        agreement={name: estimate(values, recipe.seed) for name, values in agreed.items()},
        baselines=baselines,
    )


def by_dataset(prepared: Prepared, recipe: Recipe, say: Say) -> Verdict | None:
    """Leave one dataset out, for each dataset; None when there are fewer than three."""
    datasets = prepared.fast.datasets
    names = sorted(set(datasets.tolist()))
    if len(names) < 3:
        return None
    memos = Memos.empty()
    parts = _Parts.of(len(datasets))
    scores_BM, costs_M = prepared.table.scores, prepared.table.params_b
    for name in names:
        say(f"without {name}")
        seen, judged = np.flatnonzero(datasets != name), np.flatnonzero(datasets == name)
        router = fit_router(prepared, seen, recipe, memos)
        served = _serve(router, *_rows(prepared, judged), 0, 0.0, costs_M)
        parts.put(judged, served, router.fast.general, scores_BM, costs_M)
    return parts.verdict()


@dataclass(slots=True)
class _Parts:
    """A verdict under construction."""

    arrays: dict[str, Doubles]

    @classmethod
    def of(cls, num: int) -> _Parts:
        names = ("score", "single", "gated", "slow", "cost", "category", "confidence")
        return cls({name: np.zeros(num) for name in names})

    def put(self, rows: Ints, served: _Seen, general: int, scores_BM: Doubles, costs_M: Doubles) -> None:
        self.arrays["score"][rows] = scores_BM[rows, served.expert_B]
        self.arrays["single"][rows] = scores_BM[rows, general]
        self.arrays["gated"][rows] = served.gated_B
        self.arrays["slow"][rows] = served.slow_B
        self.arrays["cost"][rows] = costs_M[served.expert_B]
        self.arrays["category"][rows] = served.category_B
        self.arrays["confidence"][rows] = served.confidence_B

    def verdict(self) -> Verdict:
        a = self.arrays
        return Verdict(
            score_B=a["score"],
            single_B=a["single"],
            gated_B=a["gated"] > 0,
            slow_B=a["slow"] > 0,
            cost_B=a["cost"],
            category_B=a["category"].astype(np.int64),
            confidence_B=a["confidence"],
        )


_Embedded = tuple[Floats, Floats | None]


def _rows(prepared: Prepared, rows: Ints) -> _Embedded:
    return prepared.fast.embedding_BD[rows], None if prepared.slow is None else prepared.slow.embedding_BD[rows]


def _taken(embedded: _Embedded, rows: Ints) -> _Embedded:
    fast_BD, slow_BD = embedded
    return fast_BD[rows], None if slow_BD is None else slow_BD[rows]


def _embedded(prepared: Prepared, prompts: list[str]) -> _Embedded:
    fast_BD = prepared.embedding.encode_all(prompts)
    if prepared.slow is None or prepared.encoder is None:
        return fast_BD, None
    return fast_BD, slow_embedding(encode_sentences(prepared.encoder, prompts), fast_BD)


def _nearest(path: Path, weight: float) -> int:
    return min(range(len(path.frontier)), key=lambda i: abs(path.frontier[i].weight - weight))


def _baselines(prepared: Prepared, seen: Ints, judged: Ints, into: dict[str, Doubles]) -> None:
    scores_BM, near = prepared.table.scores, prepared.fast.num_near
    known_BD, asked_BD = prepared.fast.embedding_BD[seen], prepared.fast.embedding_BD[judged]
    similarity = asked_BD[:, :near] @ known_BD[:, :near].T
    k = min(100, len(seen))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    into["kNN-100"][judged] = scores_BM[judged, scores_BM[seen][nearest].mean(axis=1).argmax(axis=1)]
    ridge = Ridge(alpha=10.0).fit(known_BD, scores_BM[seen])
    into["ridge"][judged] = scores_BM[judged, ridge.predict(asked_BD).argmax(axis=1)]
    into["random"][judged] = scores_BM[judged].mean(axis=1)


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


def advantages(prepared: Prepared, recipe: Recipe, weak: int, strong: int) -> Doubles:
    """Expected score of strong minus weak for each row, from models that have not seen it."""
    num = len(prepared.table)
    fold = folds_of(num, NUM_FOLDS, recipe.seed)
    memos = Memos.empty()
    result = np.zeros(num)
    for f in range(NUM_FOLDS):
        judged = np.flatnonzero(fold == f)
        path = fit_router(prepared, np.flatnonzero(fold != f), recipe, memos).fast
        found: Assessment = path.assess(prepared.fast.embedding_BD[judged])
        result[judged] = found.scores_BM[:, strong] - found.scores_BM[:, weak]
    return result


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
