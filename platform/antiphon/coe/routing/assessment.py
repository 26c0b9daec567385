"""What one path of the router computes: categories, neighbours, expected scores, familiarity (request speed, plain numpy).

    embedding ─► coarse head ─► p(category) ──────┐
             ├─► fine head ───► p(source) ────────┼─► expected score per expert
             └─► landmarks ───► neighbours ───────┘   and familiarity 0..1: how much this looks like what was trained on

Shape letters: B prompts, D embedding, C categories, F sources (finer classes), N landmarks, K neighbours, M experts. Training and
routing share this code, so what is judged is what is served. Must not know: files, policies, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NUM_SIGNALS = 4
_ONE_AND_TINY = np.float32(1.0 + 1e-4)  # keeps odds finite


def softmax(logits_BC: npt.NDArray[np.floating], temperature: float) -> Floats:
    """Row-wise softmax of ``logits_BC / temperature``."""
    scaled = (logits_BC - logits_BC.max(axis=-1, keepdims=True)) / np.float32(temperature)
    raised = np.exp(scaled)
    result: Floats = (raised / raised.sum(axis=-1, keepdims=True)).astype(np.float32)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Multinomial logistic regression over an embedding, calibrated by one temperature."""

    weights_DC: Floats
    bias_C: Floats
    temperature: float = 1.0

    def logits(self, embedding_BD: Floats) -> Floats:
        """Uncalibrated logits [B, C]."""
        result: Floats = embedding_BD @ self.weights_DC + self.bias_C
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """What the nearest landmarks say about prompts."""

    scores_BM: Floats  # mean score per expert
    agreement_B: Floats  # share of neighbours of the prompt's most probable category
    similarity_B: Floats  # mean product with the neighbours, -1..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Landmarks:
    """A fixed sample of training prompts: the first numbers of normalised embeddings, category and score per expert.

    They are few and short, so that looking through them leaves what else a decision needs in the processor's cache.
    """

    embedding_ND: Floats
    category_N: Ints
    scores_NM: Floats
    num_neighbours: int

    def look(self, embedding_BD: Floats, category_B: Ints) -> Neighbourhood:
        """The neighbourhood of each prompt, given its most probable category. Only the first D numbers of embeddings count."""
        num_landmarks, D = self.embedding_ND.shape
        similarity_BN = embedding_BD[:, :D] @ self.embedding_ND.T
        k = min(self.num_neighbours, num_landmarks)
        nearest_BK = similarity_BN.argpartition(num_landmarks - k, axis=1)[:, num_landmarks - k :]
        row_B1 = np.arange(len(nearest_BK))[:, None]
        # Plain reductions: the means of numpy cost more than the sums for one prompt.
        part = np.float32(1.0 / k)
        same_BK = self.category_N[nearest_BK] == category_B[:, None]
        return Neighbourhood(
            scores_BM=np.add.reduce(self.scores_NM[nearest_BK], axis=1) * part,
            agreement_B=np.add.reduce(same_BK, axis=1, dtype=np.float32) * part,
            similarity_B=np.add.reduce(similarity_BN[row_B1, nearest_BK], axis=1) * part,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Familiarity as a logistic regression over the signals; below ``threshold`` a prompt goes to the general expert."""

    weights: tuple[float, ...]  # NUM_SIGNALS
    bias: float
    threshold: float

    def familiarity(self, signals_BS: Floats) -> Floats:
        """0..1 for each prompt."""
        logit_B = signals_BS @ np.array(self.weights, np.float32) + np.float32(self.bias)
        within_B = np.minimum(np.maximum(logit_B, np.float32(-30.0)), np.float32(30.0))
        result: Floats = np.float32(1.0) / (np.float32(1.0) + np.exp(-within_B))
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What heads and landmarks say before calibration, mixing and gate."""

    coarse_BC: Floats  # logits
    fine_BF: Floats  # logits
    near: Neighbourhood


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Heads, landmarks and mean scores fitted on one set of prompts."""

    coarse: Head
    fine: Head
    landmarks: Landmarks
    coarse_scores_CM: Floats  # shrunken mean score of each expert in each category
    fine_scores_FM: Floats

    def raw(self, embedding_BD: Floats) -> Raw:
        """Everything that costs time, once."""
        coarse_BC = self.coarse.logits(embedding_BD)
        near = self.landmarks.look(embedding_BD, coarse_BC.argmax(axis=1))
        return Raw(coarse_BC=coarse_BC, fine_BF=self.fine.logits(embedding_BD), near=near)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How the three sources of an expected score are mixed."""

    fine_share: float  # of the heads' part; the rest is the coarse head's
    knn_share: float  # of the whole
    sharpness: float  # power of probabilities before they weigh scores: above 1, a few words change fewer decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What a path says about prompts."""

    categories_BC: Floats  # calibrated p(category)
    scores_BM: Floats  # expected score per expert
    familiarity_B: Floats
    signals_BS: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread:
    """Calibrated probabilities of a head, the largest of each row, and the same sharpened."""

    probability_BC: Floats
    top_B: Floats
    weight_BC: Floats


def _spread(logits_BC: Floats, temperature: float, sharpness: float) -> _Spread:
    below_BC = (logits_BC - np.maximum.reduce(logits_BC, axis=1, keepdims=True)) * np.float32(1.0 / temperature)
    raised_BC, sharp_BC = np.exp(below_BC), np.exp(below_BC * np.float32(sharpness))
    # The largest logit is raised to 1, so that its probability is one over the sum.
    top_B1: Floats = np.reciprocal(np.add.reduce(raised_BC, axis=1, keepdims=True))
    return _Spread(
        probability_BC=raised_BC * top_B1,
        top_B=top_B1.reshape(-1),
        weight_BC=sharp_BC / np.add.reduce(sharp_BC, axis=1, keepdims=True),
    )


def _signals(coarse: _Spread, fine: _Spread, near: Neighbourhood) -> Floats:
    """The gate's inputs [B, NUM_SIGNALS] from calibrated probabilities: log-odds of both maxima, agreement, similarity."""
    result_BS = np.empty((len(coarse.top_B), NUM_SIGNALS), np.float32)
    result_BS[:, 0], result_BS[:, 1] = coarse.top_B, fine.top_B
    top_B2 = result_BS[:, :2]
    result_BS[:, :2] = np.log(top_B2 / (_ONE_AND_TINY - top_B2))
    result_BS[:, 2], result_BS[:, 3] = near.agreement_B, near.similarity_B
    return result_BS


def assess(raw: Raw, fitted: Fitted, mix: Mix, gate: Gate) -> Assessment:
    """Calibrate, mix and gate; pure arithmetic on ``raw``."""
    coarse = _spread(raw.coarse_BC, fitted.coarse.temperature, mix.sharpness)
    fine = _spread(raw.fine_BF, fitted.fine.temperature, mix.sharpness)
    heads, knn = 1.0 - mix.knn_share, mix.knn_share
    scores_BM = np.float32(heads * (1.0 - mix.fine_share)) * (coarse.weight_BC @ fitted.coarse_scores_CM)
    scores_BM += np.float32(heads * mix.fine_share) * (fine.weight_BC @ fitted.fine_scores_FM)
    if knn:
        scores_BM += np.float32(knn) * raw.near.scores_BM
    signals_BS = _signals(coarse, fine, raw.near)
    return Assessment(
        categories_BC=coarse.probability_BC,
        scores_BM=scores_BM,
        familiarity_B=gate.familiarity(signals_BS),
        signals_BS=signals_BS,
    )
