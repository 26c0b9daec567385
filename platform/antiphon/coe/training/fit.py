"""Fits one path of the router and tunes everything about it inside the rows it is given (control speed, offline).

    rows ─► in-fold models ──► predictions of rows they have not seen ──► temperatures, mix, frontier ─┐
         ├► leave-one-group-out models ──► predictions of unseen datasets ──► gate ────────────────────┼─► Path
         └► final model ───────────────────────────────────────────────────────────────────────────────┘

Judging calls the same function with fewer rows, so no choice ever sees a judged row. Must not know: files, documents.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from antiphon.coe.routing.assessment import (
    NUM_SIGNALS,
    Assessment,
    Fitted,
    Floats,
    Gate,
    Head,
    Ints,
    Landmarks,
    Mix,
    Neighbourhood,
    Raw,
    assess,
    softmax,
)
from antiphon.coe.training.labels import Labels

Doubles = npt.NDArray[np.float64]

_ABSENT = -30.0  # bias of a class that the rows don't have
_OPEN = Gate(weights=(0.0,) * NUM_SIGNALS, bias=0.0, threshold=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that is fixed before any row is seen."""

    seed: int = 0
    num_variants: int = 6  # augmented forms per prompt in the final model
    num_inner_variants: int = 1  # the same in models that only tune
    inverse_penalty: float = 2.0  # C of logistic regression
    steadiness: float = 5.0  # how much dearer weights are in directions in which rewording moves prompts
    max_iterations: int = 150
    prior_rows: float = 10.0  # rows of the expert's mean that shrink its mean score in a category
    num_landmarks: int = 1024
    num_near: int = 128  # numbers of the fast path's embedding that its neighbours are measured in; they come in order of spread
    num_neighbours: int = 30
    num_inner_folds: int = 3
    max_left_out: int = 14  # datasets left out in turn to tune the gate
    worth_having: float = 0.003  # mean score that one more expert must bring
    harmless: float = -0.005  # mean score against the general expert's that the gate must reach on datasets it has not seen
    luck: float = 0.01  # a dataset that gains more counts as gaining just this: luck with one must not pay for harm to others
    sharpness: float = 4.0  # of the mix
    fine_shares: tuple[float, ...] = (0.3, 0.6)
    knn_shares: tuple[float, ...] = (0.0, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a path learns from. B rows, V variants, D numbers, M experts."""

    embedding_BD: Floats
    variants_BVD: Floats
    num_near: int  # the first numbers of an embedding, which neighbours are measured in
    labels: Labels
    datasets: npt.NDArray[np.str_]
    scores_BM: Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A cost weight, and what it gave on rows that the models had not seen."""

    weight: float  # score given up for the most expensive expert against a free one
    avg_cost: float  # in the experts' cost unit
    score: float
    experts: tuple[int, ...]  # the few experts that are worth having at this weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A path, ready to serve."""

    fitted: Fitted
    mix: Mix
    gate: Gate
    general: int  # the expert with the best mean score
    frontier: tuple[FrontierPoint, ...]

    def assess(self, embedding_BD: Floats) -> Assessment:
        """Categories, expected scores and familiarity of prompts."""
        return assess(self.fitted.raw(embedding_BD), self.fitted, self.mix, self.gate)


@dataclass(slots=True)
class Memo:
    """Models already fitted, by rows and number of variants: leave-two-out models serve twice. Owned by one judging run."""

    fitted: dict[tuple[bytes, int], Fitted] = field(default_factory=dict)


def fit_path(examples: Examples, rows: Ints, costs_M: Doubles, recipe: Recipe, memo: Memo | None = None) -> Path:
    """Fit and tune a path on ``rows`` alone; deterministic in its arguments."""
    memo = Memo() if memo is None else memo
    scores_BM = examples.scores_BM
    general = int(scores_BM[rows].mean(axis=0).argmax())
    seen, raws = _in_folds(examples, rows, recipe, memo)
    inside = _joined(raws)
    final = _fit(examples, rows, recipe, recipe.num_variants, memo)
    coarse = _temperature(inside.coarse_BC, examples.labels.category_B[seen])
    fine = _temperature(inside.fine_BF, examples.labels.source_B[seen])
    final = replace(final, coarse=replace(final.coarse, temperature=coarse), fine=replace(final.fine, temperature=fine))
    mix = _best_mix(inside, final, scores_BM[seen], recipe)
    ungated = assess(inside, final, mix, _OPEN).scores_BM
    few = few_experts(ungated, scores_BM[seen], np.zeros_like(costs_M), general, recipe.worth_having)
    outside_rows, groups, outside = _left_out(examples, rows, recipe, memo)
    gate = _gate(
        _advantages(inside, final, mix, scores_BM[seen], few, general, np.full(len(seen), "")),
        _advantages(outside, final, mix, scores_BM[outside_rows], few, general, groups) if outside is not None else None,
        recipe,
    )
    found = assess(inside, final, mix, gate)
    frontier = _frontier(found, scores_BM[seen], costs_M, general, gate, recipe)
    return Path(fitted=final, mix=mix, gate=gate, general=general, frontier=frontier)


def pick(found: Assessment, gate: Gate, general: int, cost_term_M: Doubles, experts: Sequence[int]) -> Ints:
    """The expert of each prompt: the best of ``experts`` after cost, or the general one where the gate closes."""
    allowed = np.array(sorted(experts), np.int64)
    chosen = allowed[(found.scores_BM - cost_term_M)[:, allowed].argmax(axis=1)]
    result: Ints = np.where(found.familiarity_B < gate.threshold, general, chosen)
    return result


def few_experts(
    expected_BM: Floats, scores_BM: Doubles, cost_term_M: Doubles, general: int, worth_having: float
) -> tuple[int, ...]:
    """The general expert and, greedily, every other that raises mean score minus cost by ``worth_having``.

    Few experts make decisions stable: near-ties between many flip with a word, and earn next to nothing.
    """
    after_cost_BM = expected_BM - cost_term_M
    value_BM = scores_BM - cost_term_M
    row = np.arange(len(scores_BM))

    def value(experts: list[int]) -> float:
        allowed = np.array(sorted(experts), np.int64)
        return float(value_BM[row, allowed[after_cost_BM[:, allowed].argmax(axis=1)]].mean())

    experts, best = [general], value([general])
    while len(experts) < scores_BM.shape[1]:
        others = [m for m in range(scores_BM.shape[1]) if m not in experts]
        gain, candidate = max((value([*experts, m]) - best, -m) for m in others)
        if gain < worth_having:
            break
        experts.append(-candidate)
        best += gain
    return tuple(sorted(experts))


def _fit(examples: Examples, rows: Ints, recipe: Recipe, num_variants: int, memo: Memo) -> Fitted:
    key = (hashlib.sha256(np.ascontiguousarray(rows).tobytes()).digest(), num_variants)
    if key in memo.fitted:
        return memo.fitted[key]
    labels, scores_BM = examples.labels, examples.scores_BM
    labelled = rows[labels.category_B[rows] >= 0]
    num_variants = min(num_variants, examples.variants_BVD.shape[1])
    embedding = np.concatenate(
        [examples.embedding_BD[labelled], *(examples.variants_BVD[labelled, v] for v in range(num_variants))]
    )
    repeats = num_variants + 1
    mean_M = scores_BM[rows].mean(axis=0)

    steady_DD = steadying(examples.embedding_BD[labelled], examples.variants_BVD[labelled], recipe.steadiness)
    embedding = embedding @ steady_DD

    def head(label_B: Ints, num_classes: int) -> Head:
        found = fit_head(embedding, np.tile(label_B[labelled], repeats), num_classes, recipe)
        return replace(found, weights_DC=steady_DD @ found.weights_DC)

    def means(label_B: Ints, num_classes: int) -> Floats:
        return shrunken_means(label_B[labelled], scores_BM[labelled], num_classes, mean_M, recipe.prior_rows)

    num_categories, num_sources = len(labels.categories), len(labels.sources)
    chosen = _landmark_rows(labelled, labels.source_B, recipe)
    result = Fitted(
        coarse=head(labels.category_B, num_categories),
        fine=head(labels.source_B, num_sources),
        landmarks=Landmarks(
            embedding_ND=np.ascontiguousarray(examples.embedding_BD[chosen, : examples.num_near]),
            category_N=labels.category_B[chosen],
            scores_NM=scores_BM[chosen].astype(np.float32),
            num_neighbours=recipe.num_neighbours,
        ),
        coarse_scores_CM=means(labels.category_B, num_categories),
        fine_scores_FM=means(labels.source_B, num_sources),
    )
    memo.fitted[key] = result
    return result


def steadying(embedding_BD: Floats, variants_BVD: Floats, steadiness: float) -> Floats:
    """A map [D, D] that shrinks the directions in which variants differ from their prompts, and keeps the mean length.

    A penalty on weights after it is ``|w|^2 + steadiness * (mean squared change of w·x between a prompt and its variants)``, the
    change measured against its mean over directions: a head learns from what rewording leaves alone.
    """
    D = embedding_BD.shape[1]
    if steadiness == 0.0 or not variants_BVD.size:
        return np.eye(D, dtype=np.float32)
    change = (variants_BVD - embedding_BD[:, None]).reshape(-1, D).astype(np.float64)
    moment_DD = change.T @ change
    moment_DD *= D / max(float(np.trace(moment_DD)), 1e-12)
    values, directions = np.linalg.eigh(np.eye(D) + steadiness * moment_DD)
    steady_DD = (directions / np.sqrt(values)) @ directions.T
    steady_DD *= np.linalg.norm(embedding_BD) / max(float(np.linalg.norm(embedding_BD @ steady_DD)), 1e-12)
    result: Floats = steady_DD.astype(np.float32)
    return result


def fit_head(embedding_BD: Floats, label_B: Ints, num_classes: int, recipe: Recipe) -> Head:
    """Logistic regression over the classes that ``label_B`` has; the others get a probability of about zero."""
    present = np.unique(label_B)
    weights = np.zeros((embedding_BD.shape[1], num_classes), np.float32)
    bias = np.full(num_classes, _ABSENT, np.float32)
    if len(present) == 1:
        bias[present[0]] = 0.0
        return Head(weights_DC=weights, bias_C=bias)
    model = LogisticRegression(C=recipe.inverse_penalty, max_iter=recipe.max_iterations, tol=1e-3)
    model.fit(embedding_BD, label_B)
    if len(present) == 2:
        weights[:, present] = np.stack([-model.coef_[0] / 2, model.coef_[0] / 2], axis=1)
        bias[present] = [-model.intercept_[0] / 2, model.intercept_[0] / 2]
    else:
        weights[:, present] = model.coef_.T
        bias[present] = model.intercept_
    return Head(weights_DC=weights, bias_C=bias)


def shrunken_means(label_B: Ints, scores_BM: Doubles, num_classes: int, prior_M: Doubles, prior_rows: float) -> Floats:
    """Mean score [num_classes, M], drawn towards ``prior_M`` as if ``prior_rows`` more rows had scored just that."""
    means = np.zeros((num_classes, scores_BM.shape[1]))
    for c in range(num_classes):
        inside = scores_BM[label_B == c]
        means[c] = (inside.sum(axis=0) + prior_rows * prior_M) / (len(inside) + prior_rows)
    return means.astype(np.float32)


def _landmark_rows(rows: Ints, source_B: Ints, recipe: Recipe) -> Ints:
    """At most num_landmarks rows, each source with its share, chosen by a seeded order of rows."""
    if len(rows) <= recipe.num_landmarks:
        return rows
    order = np.random.default_rng(recipe.seed).permutation(len(source_B))
    rank = np.empty(len(rows))
    for source in np.unique(source_B[rows]):
        inside = np.flatnonzero(source_B[rows] == source)
        inside = inside[np.argsort(order[rows[inside]], kind="stable")]
        rank[inside] = (np.arange(len(inside)) + 0.5) / len(inside)
    return np.sort(rows[np.argsort(rank, kind="stable")[: recipe.num_landmarks]])


def folds_of(num_rows: int, num_folds: int, seed: int) -> Ints:
    """A fold for each row, of near-equal sizes, shuffled by the seed."""
    return np.random.default_rng(seed).permutation(num_rows) % num_folds


def _in_folds(examples: Examples, rows: Ints, recipe: Recipe, memo: Memo) -> tuple[Ints, list[Raw]]:
    fold = folds_of(len(rows), min(recipe.num_inner_folds, len(rows)), recipe.seed + 1)
    seen, raws = [], []
    for f in np.unique(fold):
        fitted = _fit(examples, rows[fold != f], recipe, recipe.num_inner_variants, memo)
        judged = rows[fold == f]
        judged = judged[examples.labels.category_B[judged] >= 0]
        seen.append(judged)
        raws.append(fitted.raw(examples.embedding_BD[judged]))
    return np.concatenate(seen), raws


def _left_out(examples: Examples, rows: Ints, recipe: Recipe, memo: Memo) -> tuple[Ints, npt.NDArray[np.str_], Raw | None]:
    """Predictions of rows by models that have not seen their dataset (or category, when there is one dataset)."""
    groups = examples.datasets[rows]
    if len(set(groups)) < 3:
        groups = np.array([str(c) for c in examples.labels.category_B[rows]])
    names = [name for name, _ in Counter(groups.tolist()).most_common()]
    if len(names) < 3:
        return rows[:0], groups[:0], None
    outside, raws, left = [], [], []
    for name in sorted(names[: recipe.max_left_out]):
        fitted = _fit(examples, rows[groups != name], recipe, recipe.num_inner_variants, memo)
        judged = rows[groups == name]
        outside.append(judged)
        left.append(groups[groups == name])
        raws.append(fitted.raw(examples.embedding_BD[judged]))
    return np.concatenate(outside), np.concatenate(left), _joined(raws)


def _joined(raws: Sequence[Raw]) -> Raw:
    return Raw(
        coarse_BC=np.concatenate([raw.coarse_BC for raw in raws]),
        fine_BF=np.concatenate([raw.fine_BF for raw in raws]),
        near=Neighbourhood(
            scores_BM=np.concatenate([raw.near.scores_BM for raw in raws]),
            agreement_B=np.concatenate([raw.near.agreement_B for raw in raws]),
            similarity_B=np.concatenate([raw.near.similarity_B for raw in raws]),
        ),
    )


def _temperature(logits_BC: Floats, label_B: Ints) -> float:
    """The temperature with the least cross-entropy."""

    def loss(log_temperature: float) -> float:
        probability = softmax(logits_BC, float(np.exp(log_temperature)))[np.arange(len(label_B)), label_B]
        return float(-np.log(np.maximum(probability, 1e-9)).mean())

    found = minimize_scalar(loss, bounds=(-2.0, 2.5), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def _best_mix(raw: Raw, fitted: Fitted, scores_BM: Doubles, recipe: Recipe) -> Mix:
    row = np.arange(len(scores_BM))
    best, best_score = Mix(fine_share=recipe.fine_shares[0], knn_share=0.0, sharpness=recipe.sharpness), -1.0
    for fine_share in recipe.fine_shares:
        for knn_share in recipe.knn_shares:
            mix = Mix(fine_share=fine_share, knn_share=knn_share, sharpness=recipe.sharpness)
            score = float(scores_BM[row, assess(raw, fitted, mix, _OPEN).scores_BM.argmax(axis=1)].mean())
            if score > best_score + 1e-9:
                best, best_score = mix, score
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advantage:
    """For each row: the gate's inputs, and the score that the ungated pick has over the general expert's."""

    signals_BS: Floats
    gain_B: Doubles
    group_B: npt.NDArray[np.str_]  # the dataset that was left out; "" for rows inside

    def after(self, open_B: npt.NDArray[np.bool_], luck: float) -> float:
        """Mean gain when only ``open_B`` are routed, each dataset's capped at ``luck``."""
        gain_B = self.gain_B * open_B
        groups = [gain_B[self.group_B == group] for group in np.unique(self.group_B)]
        return float(sum(min(float(group.mean()), luck) * len(group) for group in groups) / len(gain_B))


def _advantages(
    raw: Raw,
    fitted: Fitted,
    mix: Mix,
    scores_BM: Doubles,
    experts: Sequence[int],
    general: int,
    group_B: npt.NDArray[np.str_],
) -> _Advantage:
    found = assess(raw, fitted, mix, _OPEN)
    chosen = pick(found, _OPEN, general, np.zeros(scores_BM.shape[1]), experts)
    gain_B = scores_BM[np.arange(len(chosen)), chosen] - scores_BM[:, general]
    return _Advantage(signals_BS=found.signals_BS, gain_B=gain_B, group_B=group_B)


def _gate(inside: _Advantage, outside: _Advantage | None, recipe: Recipe) -> Gate:
    """Tell seen from unseen datasets by the signals; then the lowest threshold that does no harm on the unseen ones."""
    if outside is None:
        # Nothing is known about unseen data: gate what is less familiar than 95 % of what was seen.
        plain = Gate(weights=(0.3, 0.3, 0.5, 4.0), bias=-4.0, threshold=0.0)
        return replace(plain, threshold=float(np.quantile(plain.familiarity(inside.signals_BS), 0.05)))
    together = np.concatenate([inside.signals_BS, outside.signals_BS]).astype(np.float64)
    seen = np.concatenate([np.ones(len(inside.gain_B)), np.zeros(len(outside.gain_B))])
    spread = together.std(axis=0) + 1e-6
    model = LogisticRegression(C=1.0, class_weight="balanced").fit(together / spread, seen)
    weights = tuple(float(w) for w in model.coef_[0] / spread)
    gate = Gate(weights=weights, bias=float(model.intercept_[0]), threshold=0.0)
    in_B, out_B = gate.familiarity(inside.signals_BS), gate.familiarity(outside.signals_BS)
    best, best_gain = 1.0, -np.inf
    for share in np.arange(0.0, 0.62, 0.02):
        threshold = float(np.quantile(in_B, share))
        harm = outside.after(out_B >= threshold, recipe.luck)
        if harm >= recipe.harmless:
            return replace(gate, threshold=threshold)
        if harm > best_gain:
            best, best_gain = threshold, harm
    return replace(gate, threshold=best)


_WEIGHTS = (
    0.0,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.06,
    0.08,
    0.1,
    0.12,
    0.15,
    0.18,
    0.2,
    0.22,
    0.24,
    0.26,
    0.32,
    0.4,
    0.55,
    0.8,
    1.5,
)


def _frontier(
    found: Assessment, scores_BM: Doubles, costs_M: Doubles, general: int, gate: Gate, recipe: Recipe
) -> tuple[FrontierPoint, ...]:
    row = np.arange(len(scores_BM))
    points = []
    for weight in _WEIGHTS:
        term = weight * costs_M / costs_M.max()
        experts = few_experts(found.scores_BM, scores_BM, term, general, recipe.worth_having)
        chosen = pick(found, gate, general, term, experts)
        points.append(
            FrontierPoint(
                weight=weight,
                avg_cost=float(costs_M[chosen].mean()),
                score=float(scores_BM[row, chosen].mean()),
                experts=experts,
            )
        )
    return tuple(points)
