"""Fits what a path is made of: class head, score heads, likeness, mean scores, landmarks (control speed, offline).

Must not know: folds, gates, policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve
from sklearn.linear_model import LogisticRegression

from antiphon.coe.routing.assessment import Floats, Ints, Likeness

Doubles = npt.NDArray[np.float64]

_ABSENT = -30.0  # bias of a class that the rows don't have
_MAX_PRIOR_ROWS = 1000.0
_ABSENT_CENTRE = -1e6  # bias of a centre that no row has
_SHRINKAGE = 1.0  # of the spread within classes: mean variances that are added to every direction
_MAX_DIRECTIONS = 48
_FLAT = 1e-6  # of the spread between classes in the direction where it is the greatest


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """One linear map of an embedding per class or expert."""

    weights_DC: Floats
    bias_C: Floats


def steadying(embedding_BD: Floats, variants_BVD: Floats, steadiness: float) -> Floats:
    """A map [D, D] that shrinks the directions in which variants differ from their prompts, and keeps the mean length.

    A penalty on weights after it is ``|w|^2 + steadiness * (mean squared change of w·x between a prompt and its variants)``, the
    change measured against its mean over directions: a head learns from what rewording leaves alone.
    """
    D = embedding_BD.shape[1]
    if steadiness == 0.0 or not variants_BVD.size:
        return np.eye(D, dtype=np.float32)
    change = (variants_BVD - embedding_BD[:, None]).reshape(-1, D)
    moment_DD = (change.T @ change).astype(np.float64)
    moment_DD *= D / max(float(np.trace(moment_DD)), 1e-12)
    values, directions = np.linalg.eigh(np.eye(D) + steadiness * moment_DD)
    steady_DD = (directions / np.sqrt(values)) @ directions.T
    steady_DD *= np.linalg.norm(embedding_BD) / max(float(np.linalg.norm(embedding_BD @ steady_DD)), 1e-12)
    result: Floats = steady_DD.astype(np.float32)
    return result


def fit_classes(
    embedding_BD: Floats | Doubles, label_B: Ints, num_classes: int, inverse_penalty: float, max_iterations: int
) -> Head:
    """Logistic regression over the classes that ``label_B`` has; the others get a probability of about zero."""
    present = np.unique(label_B)
    weights = np.zeros((embedding_BD.shape[1], num_classes), np.float32)
    bias = np.full(num_classes, _ABSENT, np.float32)
    if len(present) == 1:
        bias[present[0]] = 0.0
        return Head(weights_DC=weights, bias_C=bias)
    model = LogisticRegression(C=inverse_penalty, max_iter=max_iterations, tol=1e-3)
    model.fit(embedding_BD, label_B)
    if len(present) == 2:
        weights[:, present] = np.stack([-model.coef_[0] / 2, model.coef_[0] / 2], axis=1)
        bias[present] = [-model.intercept_[0] / 2, model.intercept_[0] / 2]
    else:
        weights[:, present] = model.coef_.T
        bias[present] = model.intercept_
    return Head(weights_DC=weights, bias_C=bias)


def fit_values(embedding_BD: Floats, scores_BM: Doubles, penalty: float) -> Head:
    """Ridge regression of every expert's score; ``penalty`` is in rows of a mean embedding."""
    mean_D = embedding_BD.mean(axis=0, dtype=np.float64)
    mean_M = scores_BM.mean(axis=0)
    gram_DD = (embedding_BD.T @ embedding_BD).astype(np.float64) - len(embedding_BD) * np.outer(mean_D, mean_D)
    moment_DM = embedding_BD.T.astype(np.float64) @ scores_BM - len(embedding_BD) * np.outer(mean_D, mean_M)
    weights_DM = solve(gram_DD + penalty * np.eye(len(gram_DD)), moment_DM, assume_a="pos")
    return Head(weights_DC=weights_DM.astype(np.float32), bias_C=(mean_M - mean_D @ weights_DM).astype(np.float32))


def fit_likeness(embedding_BD: Floats, variants_BVD: Floats, label_B: Ints, num_classes: int) -> tuple[Head, Likeness]:
    """Directions in which classes differ, and the classes' centres there: Fisher's discriminants, spread within classes shared.

    log p(x as one of the classes) - log p(x as any), both normal, of the same spread but for that between classes. It changes along
    the discriminants alone: with ``u`` what they say of x, scaled by what they hold of the whole, it is
    ``log sum_c exp(u·centre_c + bias_c) - |u|²/2`` and a constant. Prompts and their variants count half each.
    """
    D = embedding_BD.shape[1]
    present, place_B = np.unique(label_B, return_inverse=True)
    if len(present) < 2:
        return Head(weights_DC=np.zeros((D, 0), np.float32), bias_C=np.zeros(0, np.float32)), Likeness.none(num_classes)
    share_C = np.bincount(place_B) / len(place_B)
    middle_BD = embedding_BD.astype(np.float64)
    if variants_BVD.size:
        middle_BD = (middle_BD + variants_BVD.mean(axis=1, dtype=np.float64)) / 2
    means_CD = np.stack([middle_BD[place_B == c].mean(axis=0) for c in range(len(present))])
    mean_D = share_C @ means_CD
    rest_BD = (embedding_BD - means_CD[place_B]).astype(np.float32)
    within_DD = (rest_BD.T @ rest_BD).astype(np.float64) / len(rest_BD)
    if variants_BVD.size:
        rest_BD = (variants_BVD - means_CD[place_B][:, None]).astype(np.float32).reshape(-1, D)
        within_DD = (within_DD + (rest_BD.T @ rest_BD).astype(np.float64) / len(rest_BD)) / 2
    within_DD += max(_SHRINKAGE * float(np.trace(within_DD)) / D, 1e-9) * np.eye(D)
    values, axes = np.linalg.eigh(within_DD)
    whitening_DD = axes / np.sqrt(values)
    apart_CD = (means_CD - mean_D) @ whitening_DD
    _, spread_K, turned_KD = np.linalg.svd(np.sqrt(share_C)[:, None] * apart_CD, full_matrices=False)
    between_K = spread_K**2
    kept = np.flatnonzero(between_K > _FLAT * max(float(between_K[0]), 1e-12))[: min(_MAX_DIRECTIONS, len(present) - 1)]
    turned_DK, between_K = turned_KD[kept].T, between_K[kept]
    scale_K = np.sqrt(between_K / (1.0 + between_K))
    weights_DK = whitening_DD @ turned_DK * scale_K
    centre_CK = apart_CD @ turned_DK
    centres_FK, bias_F = np.zeros((num_classes, len(kept)), np.float32), np.full(num_classes, _ABSENT_CENTRE, np.float32)
    centres_FK[present], bias_F[present] = centre_CK / scale_K, -0.5 * (centre_CK**2).sum(axis=1)
    directions = Head(weights_DC=weights_DK.astype(np.float32), bias_C=(-mean_D @ weights_DK).astype(np.float32))
    return directions, Likeness(centres_FK=centres_FK, bias_F=bias_F)


def prior_rows(label_B: Ints, scores_BM: Doubles) -> float:
    """How many rows of the overall mean a class's mean is to be drawn by: noise within classes over spread between them.

    The empirical-Bayes estimate by moments, pooled over experts: a table whose classes differ much is drawn little.
    """
    classes, sizes = np.unique(label_B, return_counts=True)
    if len(classes) < 2 or sizes.max() < 2:
        return _MAX_PRIOR_ROWS if len(classes) > 1 else 0.0
    means_CM = np.stack([scores_BM[label_B == c].mean(axis=0) for c in classes])
    rest_BM = scores_BM - means_CM[np.searchsorted(classes, label_B)]
    within = float((rest_BM**2).sum() / (max(1, len(label_B) - len(classes)) * scores_BM.shape[1]))
    between = float(means_CM.var(axis=0, ddof=1).mean()) - within * float((1.0 / sizes).mean())
    return min(_MAX_PRIOR_ROWS, within / between) if between > 0 else _MAX_PRIOR_ROWS


def shrunken_means(label_B: Ints, scores_BM: Doubles, num_classes: int, prior_M: Doubles, num_prior_rows: float) -> Floats:
    """Mean score [num_classes, M], drawn towards ``prior_M`` as if ``num_prior_rows`` more rows had scored just that."""
    means = np.zeros((num_classes, scores_BM.shape[1]))
    for c in range(num_classes):
        inside = scores_BM[label_B == c]
        rows = len(inside) + num_prior_rows
        means[c] = prior_M if rows == 0 else (inside.sum(axis=0) + num_prior_rows * prior_M) / rows
    return means.astype(np.float32)


def landmark_rows(rows: Ints, class_B: Ints, num_landmarks: int, seed: int) -> Ints:
    """At most num_landmarks rows, each class with its share, chosen by a seeded order of rows."""
    if len(rows) <= num_landmarks:
        return rows
    order = np.random.default_rng(seed).permutation(len(class_B))
    rank = np.empty(len(rows))
    for source in np.unique(class_B[rows]):
        inside = np.flatnonzero(class_B[rows] == source)
        inside = inside[np.argsort(order[rows[inside]], kind="stable")]
        rank[inside] = (np.arange(len(inside)) + 0.5) / len(inside)
    return np.sort(rows[np.argsort(rank, kind="stable")[:num_landmarks]])
