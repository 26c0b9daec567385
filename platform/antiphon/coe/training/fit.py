"""Fits one path of the router and tunes everything about it inside the rows it is given (control speed, offline).

    rows ─► in-fold models ──► predictions of rows they have not seen ──► temperature, mix, frontier ─┐
         ├► leave-one-group-out models ──► predictions of unseen datasets ──► gate ───────────────────┼─► Path
         └► final model ──────────────────────────────────────────────────────────────────────────────┘

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
from scipy.sparse import csr_matrix, vstack

from antiphon.coe.routing.assessment import (
    Assessment,
    Fitted,
    Floats,
    Gate,
    Ints,
    Mix,
    Raw,
    assess,
    behind_plain,
    class_probabilities,
    plain_scores,
    softmax,
)
from antiphon.coe.routing.embedding import TokenVectors, WordVectors
from antiphon.coe.training.data.labels import Labels
from antiphon.coe.training.encoders.topics import fit_topics, topic_rows
from antiphon.coe.training.encoders.words import WordCounts, fit_words, word_rows
from antiphon.coe.training.frontier import Foreign, FrontierPoint, frontier
from antiphon.coe.training.gating import OPEN, Rehearsal, choose_departure, rehearsed, scale_of
from antiphon.coe.training.heads import fit_classes, fit_likeness, fit_values, landmark_rows, prior_rows, shrunken_means, steadying

Doubles = npt.NDArray[np.float64]

_BEYOND_DOUBT = 2.0  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that is fixed before any row is seen."""

    seed: int = 0
    num_variants: int = 6  # augmented forms per prompt in the final model
    num_inner_variants: int = 1  # the same in models that only tune
    num_topics: int = 128
    num_word_directions: int = 100
    inverse_penalty: float = 10.0  # C of logistic regression, per prompt: its variants share its weight
    value_penalty: float = 30.0  # of the score heads
    steadiness: float = 5.0  # how much dearer weights are in directions in which rewording moves prompts
    max_iterations: int = 60
    max_word_iterations: int = 300
    num_landmarks: int = 1024
    num_near: int = 128  # numbers of the fast path's embedding that neighbours are measured in; they come in order of spread
    num_inner_folds: int = 3
    max_left_out: int = 8  # datasets left out in turn to tune the gate, the largest
    worth_having: float = 0.001  # mean score that an expert must bring to the category that would miss it most
    category_share: float = 0.5
    value_shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.7, 1.0)
    word_shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spaces:
    """Vectors that were made from the rows that a model was fitted on."""

    topics: TokenVectors
    words: WordVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a path learns from. B rows, V variants, D numbers, M experts."""

    embedding_BD: Floats
    variants_BVD: Floats
    present_BW: csr_matrix  # distinct tokens of each prompt
    variants_present_VBW: tuple[csr_matrix, ...]
    counts: WordCounts
    token_weight_W: Doubles
    num_near: int  # the first numbers of an embedding, which neighbours are measured in
    labels: Labels
    datasets: npt.NDArray[np.str_]
    scores_BM: Doubles

    def features(self, rows: Ints, spaces: Spaces) -> Floats:
        """What a model sees of these prompts [rows, D + topics + words]."""
        return np.concatenate([self.plain_features(rows, spaces.topics), word_rows(self.counts, rows, spaces.words)], axis=1)

    def plain_features(self, rows: Ints, topics: TokenVectors) -> Floats:
        """What all heads but the word head see of these prompts [rows, D + topics]."""
        return np.concatenate([self.embedding_BD[rows], topic_rows(self.present_BW[rows], topics)], axis=1)

    def variant_features(self, rows: Ints, num_variants: int, topics: TokenVectors) -> Floats:
        """The same of the first variants of these prompts [rows, variants, D + topics]."""
        if num_variants == 0 or not len(rows):
            width = self.embedding_BD.shape[1] + topics.table_VD.shape[1]
            return np.zeros((len(rows), 0, width), np.float32)
        present = vstack([self.variants_present_VBW[v][rows] for v in range(num_variants)]).tocsr()
        found = topic_rows(present, topics).reshape(num_variants, len(rows), -1).transpose(1, 0, 2)
        return np.concatenate([self.variants_BVD[rows, :num_variants], found], axis=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What was fitted on one set of rows: the served part, and its spaces."""

    fitted: Fitted
    spaces: Spaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A path, ready to serve."""

    fitted: Fitted
    spaces: Spaces
    mix: Mix
    gate: Gate
    general: int  # the expert with the best mean score
    frontier: tuple[FrontierPoint, ...]

    def assess(self, features_BD: Floats) -> Assessment:
        """Categories, expected scores and familiarity of prompts, of features in its own spaces."""
        return assess(self.fitted.raw(features_BD), self.fitted, self.mix, self.gate)


@dataclass(slots=True)
class Memo:
    """Models already fitted, by rows and number of variants: leave-two-out models serve twice. Owned by one judging run."""

    models: dict[tuple[bytes, int], Model] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows, and what a model says of them that has not seen them."""

    rows: Ints
    raw: Raw
    fitted: Fitted
    group: str = ""  # the dataset that was left out


def fit_path(examples: Examples, rows: Ints, costs_M: Doubles, recipe: Recipe, memo: Memo | None = None) -> Path:
    """Fit and tune a path on ``rows`` alone; deterministic in its arguments."""
    memo = Memo() if memo is None else memo
    scores_BM, category_B = examples.scores_BM, examples.labels.category_B
    general = int(scores_BM[rows].mean(axis=0).argmax())
    inside = _in_folds(examples, rows, recipe, memo)
    outside = _left_out(examples, rows, recipe, memo)
    seen = np.concatenate([part.rows for part in inside])
    final = _fit(examples, rows, recipe, recipe.num_variants, memo)
    source_B = examples.labels.source_B[seen]
    temperature = _temperature(np.concatenate([part.raw.logits_BF for part in inside]), source_B)
    mix = _best_mix(inside, scores_BM, temperature, _word_share(inside, source_B, temperature, recipe), recipe)
    scale = scale_of([part.raw.signal_B for part in inside], [part.raw.signal_B for part in outside])
    departure = choose_departure(
        scale,
        [_rehearsal(part, temperature, mix, scale, scores_BM) for part in inside],
        [_rehearsal(part, temperature, mix, scale, scores_BM) for part in outside],
    )
    gate, mix = departure.gate, replace(mix, hold=departure.hold, strange_hold=departure.strange_hold)
    mix = replace(mix, trust=_trust(outside, temperature, mix, gate, scores_BM))
    found = _joined([_assessed(part, temperature, mix, gate) for part in inside])
    foreign = [_foreign(part, temperature, mix, gate, scores_BM) for part in outside]
    plain_B = _plain_scores(inside, scores_BM)
    points = frontier(found, scores_BM[seen], category_B[seen], costs_M, general, gate, recipe.worth_having, foreign, plain_B)
    fitted = replace(final.fitted, temperature=temperature)
    return Path(fitted=fitted, spaces=final.spaces, mix=mix, gate=gate, general=general, frontier=points)


def _fit(examples: Examples, rows: Ints, recipe: Recipe, num_variants: int, memo: Memo) -> Model:
    key = (hashlib.sha256(np.ascontiguousarray(rows).tobytes()).digest(), num_variants)
    if key in memo.models:
        return memo.models[key]
    labels, scores_BM = examples.labels, examples.scores_BM
    labelled = rows[labels.category_B[rows] >= 0]
    num_variants = min(num_variants, examples.variants_BVD.shape[1])
    topics = fit_topics(examples.present_BW[rows], examples.token_weight_W, recipe.num_topics, recipe.seed)
    words, word_RD = fit_words(examples.counts, rows, recipe.num_word_directions, recipe.seed)
    plain_BD = examples.plain_features(labelled, topics)
    variants_BVD = examples.variant_features(labelled, num_variants, topics)
    D = plain_BD.shape[1]
    steady_DD = steadying(plain_BD, variants_BVD, recipe.steadiness)
    together = np.concatenate([plain_BD, variants_BVD.transpose(1, 0, 2).reshape(-1, D)]) @ steady_DD
    class_B, category_B = labels.source_B[labelled], labels.category_B[labelled]
    repeated_B = np.tile(class_B, num_variants + 1)
    num_classes, num_categories = len(labels.sources), len(labels.categories)
    # Prompt and variants count as one: else weights, and with them energies, would grow with the number of variants.
    inverse_penalty = recipe.inverse_penalty / (num_variants + 1)
    classes = fit_classes(together, repeated_B, num_classes, inverse_penalty, recipe.max_iterations)
    # Words as they stand, without variants: what rewording leaves alone is the class head's to know.
    word_BD = word_RD[labels.category_B[rows] >= 0]
    # Scores of single prompts are mostly noise: what steadies classes takes more from these heads than they can spare.
    values = fit_values(np.concatenate([plain_BD, word_BD], axis=1), scores_BM[labelled], recipe.value_penalty)
    by_word = fit_classes(word_BD, class_B, num_classes, recipe.inverse_penalty, recipe.max_word_iterations)
    directions, likeness = fit_likeness(plain_BD, variants_BVD, class_B, num_classes)
    mean_M = scores_BM[rows].mean(axis=0)
    chosen = landmark_rows(np.arange(len(labelled)), class_B, recipe.num_landmarks, recipe.seed)
    result = Model(
        fitted=Fitted(
            heads_DH=np.concatenate(
                [
                    _above(steady_DD @ classes.weights_DC, word_BD.shape[1]),
                    values.weights_DC,
                    _above(directions.weights_DC, word_BD.shape[1]),
                    _below(by_word.weights_DC, D),
                ],
                axis=1,
            ),
            bias_H=np.concatenate([classes.bias_C, values.bias_C, directions.bias_C, by_word.bias_C]),
            temperature=1.0,
            category_F=_categories_of(labels),
            class_scores_FM=shrunken_means(
                class_B, scores_BM[labelled], num_classes, mean_M, prior_rows(class_B, scores_BM[labelled])
            ),
            category_scores_CM=shrunken_means(
                category_B, scores_BM[labelled], num_categories, mean_M, prior_rows(category_B, scores_BM[labelled])
            ),
            # Clusters are classes that nobody gave: a plain router has one class, the whole.
            plain_scores_FM=shrunken_means(class_B, scores_BM[labelled], num_classes, mean_M, 1e9 * (labels.how == "clusters")),
            mean_M=mean_M.astype(np.float32),
            general=int(mean_M.argmax()),
            landmarks_ND=np.concatenate([plain_BD, word_BD], axis=1)[chosen].astype(np.float32),
            likeness=likeness,
        ),
        spaces=Spaces(topics=topics, words=words),
    )
    memo.models[key] = result
    return result


def _above(heads_DC: Floats, num_more: int) -> Floats:
    """Heads that ask nothing of the last numbers of an embedding."""
    return np.pad(heads_DC, ((0, num_more), (0, 0)))


def _below(heads_DC: Floats, num_more: int) -> Floats:
    """Heads that ask nothing of the first ones."""
    return np.pad(heads_DC, ((num_more, 0), (0, 0)))


def _categories_of(labels: Labels) -> Ints:
    """The category of each class: classes are made of one category each."""
    category_F = np.zeros(len(labels.sources), np.int64)
    labelled = labels.source_B >= 0
    category_F[labels.source_B[labelled]] = labels.category_B[labelled]
    return category_F


def folds_of(num_rows: int, num_folds: int, seed: int) -> Ints:
    """A fold for each row, of near-equal sizes, shuffled by the seed."""
    return np.random.default_rng(seed).permutation(num_rows) % num_folds


def _in_folds(examples: Examples, rows: Ints, recipe: Recipe, memo: Memo) -> list[_Part]:
    fold = folds_of(len(rows), min(recipe.num_inner_folds, len(rows)), recipe.seed + 1)
    parts = []
    for f in np.unique(fold):
        judged = rows[fold == f]
        judged = judged[examples.labels.category_B[judged] >= 0]
        parts.append(_part(examples, rows[fold != f], judged, recipe, memo))
    return parts


def _left_out(examples: Examples, rows: Ints, recipe: Recipe, memo: Memo) -> list[_Part]:
    """Predictions of rows by models that have not seen their dataset (or category, when there are fewer than three)."""
    groups = examples.datasets[rows]
    if len(set(groups)) < 3:
        groups = np.array([str(c) for c in examples.labels.category_B[rows]])
    names = [name for name, _ in Counter(groups.tolist()).most_common()]
    if len(names) < 3:
        return []
    return [
        _part(examples, rows[groups != name], rows[groups == name], recipe, memo, name)
        for name in sorted(names[: recipe.max_left_out])
        if (examples.labels.category_B[rows[groups != name]] >= 0).any()
    ]


def _part(examples: Examples, learnt: Ints, judged: Ints, recipe: Recipe, memo: Memo, group: str = "") -> _Part:
    model = _fit(examples, learnt, recipe, recipe.num_inner_variants, memo)
    raw = model.fitted.raw(examples.features(judged, model.spaces))
    return _Part(rows=judged, raw=raw, fitted=model.fitted, group=group)


def _assessed(part: _Part, temperature: float, mix: Mix, gate: Gate) -> Assessment:
    """By the part's own means: those of the final model know the judged rows."""
    return assess(part.raw, replace(part.fitted, temperature=temperature), mix, gate)


def _joined(found: Sequence[Assessment]) -> Assessment:
    return Assessment(
        categories_BC=np.concatenate([one.categories_BC for one in found]),
        scores_BM=np.concatenate([one.scores_BM for one in found]),
        leads_BM=np.concatenate([one.leads_BM for one in found]),
        familiarity_B=np.concatenate([one.familiarity_B for one in found]),
    )


def _temperature(logits_BC: Floats, label_B: Ints) -> float:
    """The temperature with the least cross-entropy."""

    def loss(log_temperature: float) -> float:
        probability = softmax(logits_BC, float(np.exp(log_temperature)))[np.arange(len(label_B)), label_B]
        return float(-np.log(np.maximum(probability, 1e-9)).mean())

    found = minimize_scalar(loss, bounds=(-2.0, 2.5), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def _word_share(inside: Sequence[_Part], source_B: Ints, temperature: float, recipe: Recipe) -> float:
    """The word head's share of p(class) with the least cross-entropy: far less noisy a measure than routed scores."""
    row = np.arange(len(source_B))

    def loss(share: float) -> float:
        class_BF = np.concatenate([class_probabilities(part.raw, temperature, share) for part in inside])
        return float(-np.log(np.maximum(class_BF[row, source_B], 1e-9)).mean())

    return min(recipe.word_shares, key=loss)


def _best_mix(inside: Sequence[_Part], scores_BM: Doubles, temperature: float, word_share: float, recipe: Recipe) -> Mix:
    """The share of the score heads that predicts differences between experts best, where it changes routed scores for the better.

    Beyond doubt, that is, by two standard errors, or not at all: what predicts a little better by each prompt also flips near-ties,
    and that a few more flips went well on inner folds says nothing of the next prompts.
    """
    actual_BM = np.concatenate([scores_BM[part.rows] for part in inside])
    row = np.arange(len(actual_BM))
    best = Mix(category_share=recipe.category_share, value_share=0.0, trust=0.0, word_share=word_share)
    best_error = np.inf
    plain_B: Doubles = np.zeros(len(actual_BM))
    for share in recipe.value_shares:
        mix = replace(best, value_share=share)
        expected_BM = np.concatenate([_assessed(part, temperature, mix, OPEN).scores_BM for part in inside])
        routed_B = actual_BM[row, expected_BM.argmax(axis=1)]
        if share == 0.0:
            plain_B = routed_B
        gain_B = routed_B - plain_B
        doubt = _BEYOND_DOUBT * float(gain_B.std()) / np.sqrt(len(gain_B))
        rest_BM = actual_BM - expected_BM
        error = float(((rest_BM - rest_BM.mean(axis=1, keepdims=True)) ** 2).mean())
        if error < best_error and float(gain_B.mean()) >= doubt:
            best, best_error = mix, error
    return best


def _plain_scores(parts: Sequence[_Part], scores_BM: Doubles) -> Doubles:
    return np.concatenate([scores_BM[part.rows, plain_scores(part.raw, part.fitted).argmax(axis=1)] for part in parts])


def _rehearsal(part: _Part, temperature: float, mix: Mix, scale: Gate, scores_BM: Doubles) -> Rehearsal:
    plain_BM, actual_BM = plain_scores(part.raw, part.fitted), scores_BM[part.rows]
    return rehearsed(
        _assessed(part, temperature, mix, scale).scores_BM,
        behind_plain(part.raw, part.fitted),
        part.fitted.general,
        actual_BM,
        actual_BM[np.arange(len(actual_BM)), plain_BM.argmax(axis=1)],
        part.raw.signal_B,
    )


def _foreign(part: _Part, temperature: float, mix: Mix, gate: Gate, scores_BM: Doubles) -> Foreign:
    found = _assessed(part, temperature, mix, gate)
    return Foreign(found=found, scores_BM=scores_BM[part.rows], general=part.fitted.general)


def _trust(outside: Sequence[_Part], temperature: float, mix: Mix, gate: Gate, scores_BM: Doubles) -> float:
    """How much of an expected score's distance from the mean holds for foreign prompts that the gate closes on: least squares."""
    explained, spread = 0.0, 0.0
    for part in outside:
        found = _assessed(part, temperature, mix, OPEN)
        closed = gate.familiarity(part.raw.signal_B) < np.float32(gate.threshold)
        expected_BM = (found.scores_BM - part.fitted.mean_M)[closed]
        explained += float((expected_BM * (scores_BM[part.rows][closed] - part.fitted.mean_M)).sum())
        spread += float((expected_BM**2).sum())
    return min(1.0, max(0.0, explained / spread)) if spread else 0.0
