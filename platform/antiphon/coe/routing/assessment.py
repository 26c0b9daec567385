"""What one path of the router computes: categories, expected scores, familiarity (request speed; numpy, and C for one prompt).

    embedding ─┬► class head ─┬─► p(class) ─┬─► p(category): the sum over its classes
               │              │       ▲     └─► mean scores of classes and categories ─┐
               ├► word head ──│───────┘ a share, and by itself: ─► the plain router's pick ─► the lead asked of others
               ├► score heads │────────────────────────────────────────────────────────┴─► expected score per expert
               └► likeness ─► how much nearer to the centres of classes than to the middle of all ─► familiarity 0..1

A class is a category within a dataset. Likeness is a few directions in which classes differ (Fisher's discriminants): the logarithm
of how likely a prompt is as one of the classes, over how likely it is as any text (relative Mahalanobis distance, Ren et al. 2021,
arXiv 2106.09022). Artifacts before format 8 have none and go by the energy of the class head's logits (Liu et al. 2020, arXiv
2010.03759). Shape letters: B prompts, D embedding, C categories, F classes, K directions, N landmarks, M experts.
Training and routing share this code, so what is judged is what is served. Must not know: files, policies, clocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.native import build

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_MAX_LOGIT = 30.0  # of familiarity, which stays off 0 and 1
_TIE = np.float32(1e-6)  # of the plain router's scores: experts this near to its best are its pick too


def softmax(logits_BC: npt.NDArray[np.floating], temperature: float) -> Floats:
    """Row-wise softmax of ``logits_BC / temperature``."""
    raised: Floats = np.exp((logits_BC - np.maximum.reduce(logits_BC, axis=-1, keepdims=True)) * np.float32(1.0 / temperature))
    raised /= np.add.reduce(raised, axis=-1, keepdims=True)
    return raised


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Familiarity as a logistic function of the signal; below ``threshold`` a prompt goes to the general expert.

    Above it, the less familiar a prompt is, the further ahead of the general expert another must be expected: by ``caution`` at a
    familiarity of 0, by nothing from ``caution_below`` on. Small leads on unfamiliar prompts are noise.
    """

    weight: float
    bias: float
    threshold: float
    caution: float = 0.0  # expected score
    caution_below: float = 1.0  # familiarity; above 0

    def familiarity(self, signal_B: Floats) -> Floats:
        """0..1 for each prompt."""
        logit_B = np.clip(self.weight * signal_B.astype(np.float64) + self.bias, -_MAX_LOGIT, _MAX_LOGIT)
        result: Floats = (1.0 / (1.0 + np.exp(-logit_B))).astype(np.float32)
        return result

    def strangeness(self, familiarity_B: Floats) -> Floats:
        """1 at a familiarity of 0, 0 from ``caution_below`` on, for each prompt."""
        result: Floats = np.maximum(np.float32(0.0), np.float32(1.0) - familiarity_B / np.float32(self.caution_below))
        return result

    def lead(self, familiarity_B: Floats) -> Floats:
        """The expected score by which another expert must be ahead of the general one, for each prompt."""
        result: Floats = np.float32(self.caution) * self.strangeness(familiarity_B)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What the heads say before calibration, mixing and gate."""

    logits_BF: Floats
    value_BM: Floats  # expected scores by the score heads
    word_BF: Floats  # logits of classes by the words alone; no columns without a word head
    signal_B: Floats  # the gate's


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Classes in the directions in which they differ; the directions are columns of the heads."""

    centres_FK: Floats
    bias_F: Floats  # of classes, what their centres are worth

    @classmethod
    def none(cls, num_classes: int) -> Likeness:
        """No directions: the signal is the energy of the class head's logits."""
        return cls(centres_FK=np.zeros((num_classes, 0), np.float32), bias_F=np.zeros(num_classes, np.float32))

    def signal(self, along_BK: Floats, logits_BF: Floats) -> Floats:
        """The gate's signal of prompts, where ``along_BK`` is what the directions say: log p(as one of the classes) / p(as any)."""
        if not self.centres_FK.shape[1]:
            return _energy(logits_BF)
        nearest: Floats = _energy(along_BK @ self.centres_FK.T + self.bias_F)
        nearest -= np.float32(0.5) * np.add.reduce(along_BK * along_BK, axis=1)
        return nearest


def _energy(logits_BF: Floats) -> Floats:
    top_B1 = np.maximum.reduce(logits_BF, axis=1, keepdims=True)
    result: Floats = np.log(np.add.reduce(np.exp(logits_BF - top_B1), axis=1)) + top_B1[:, 0]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Heads and mean scores fitted on one set of prompts."""

    # H = F + M + K or F + M + K + F: logits of classes, scores of experts, likeness, logits of classes by words
    heads_DH: Floats
    bias_H: Floats
    temperature: float  # of the classes' logits
    category_F: Ints  # the category of each class
    class_scores_FM: Floats  # mean score of each expert in each class
    category_scores_CM: Floats
    mean_M: Floats  # mean score of each expert
    general: int  # the expert that has the best one, and serves what is not familiar
    plain_scores_FM: Floats  # as class_scores_FM, drawn to nothing: with the word head, the plain router
    landmarks_ND: Floats  # a fixed sample of training prompts, which stand for requests to come
    likeness: Likeness

    def raw(self, embedding_BD: Floats) -> Raw:
        """Everything that costs time, once."""
        found_BH: Floats = embedding_BD @ self.heads_DH
        found_BH += self.bias_H
        F, end = len(self.category_F), len(self.category_F) + len(self.mean_M)
        word = end + self.num_directions
        return Raw(
            logits_BF=found_BH[:, :F],
            value_BM=found_BH[:, F:end],
            word_BF=found_BH[:, word:],
            signal_B=self.likeness.signal(found_BH[:, end:word], found_BH[:, :F]),
        )

    @property
    def num_directions(self) -> int:
        """K."""
        return int(self.likeness.centres_FK.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How an expected score is mixed from its sources."""

    category_share: float  # of the means' part: the category's; the rest is the class's
    value_share: float  # of the whole: the score heads'
    trust: float  # how much of its distance from the expert's mean counts for a prompt that the gate holds back
    word_share: float = 0.0  # of p(class): the word head's
    # Expected score by which another expert must be ahead of the plain router's pick (classes by words alone): for familiar
    # prompts, and for those that are strange at all. 1 is out of reach.
    hold: float = 0.0
    strange_hold: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the plain router has a say."""
        return bool(self.hold or self.strange_hold)

    @property
    def asks_words(self) -> bool:
        """Whether the word head has a say."""
        return bool(self.word_share or self.holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What a path says about prompts."""

    categories_BC: Floats  # calibrated p(category)
    scores_BM: Floats  # expected score per expert
    leads_BM: Floats  # by how much each expert must be ahead of those of whom less is asked
    familiarity_B: Floats

    def net(self, leads: float = 1.0) -> Floats:
        """What experts are compared by: expected scores less this share of the leads."""
        result: Floats = self.scores_BM - np.float32(leads) * self.leads_BM
        return result


def assess(raw: Raw, fitted: Fitted, mix: Mix, gate: Gate) -> Assessment:
    """Calibrate, mix and gate; pure arithmetic on ``raw``."""
    class_BF = class_probabilities(raw, fitted.temperature, mix.word_share)
    scores_BM = class_BF @ mixed_means(fitted, mix)
    if mix.value_share:
        scores_BM += np.float32(mix.value_share) * raw.value_BM
    categories_BC = class_BF @ members(fitted)
    familiarity_B = gate.familiarity(raw.signal_B)
    leads_BM = np.zeros_like(scores_BM)
    if mix.holds:
        strange_B = gate.strangeness(familiarity_B)
        leads_BM += np.where(strange_B > 0.0, np.float32(mix.strange_hold), np.float32(mix.hold))[:, None] * behind_plain(
            raw, fitted
        )
    # Expected scores of what is not familiar are drawn to the experts' means: there, means are what is known.
    trust_B1 = np.where(familiarity_B < np.float32(gate.threshold), np.float32(mix.trust), np.float32(1.0))[:, None]
    scores_BM = fitted.mean_M + trust_B1 * (scores_BM - fitted.mean_M)
    if gate.caution:
        leads_BM += gate.lead(familiarity_B)[:, None] * others(fitted)
    return Assessment(categories_BC=categories_BC, scores_BM=scores_BM, leads_BM=leads_BM, familiarity_B=familiarity_B)


def behind_plain(raw: Raw, fitted: Fitted) -> npt.NDArray[np.bool_]:
    """Whether an expert is behind the plain router's pick, by the plain router's own scores [B, M]."""
    plain_BM = plain_scores(raw, fitted)
    result: npt.NDArray[np.bool_] = plain_BM < plain_BM.max(axis=1, keepdims=True) - _TIE
    return result


def plain_scores(raw: Raw, fitted: Fitted) -> Floats:
    """What the plain router expects [B, M]: classes by words alone, times the mean score of each expert in each."""
    result: Floats = softmax(raw.word_BF, 1.0) @ fitted.plain_scores_FM
    return result


def class_probabilities(raw: Raw, temperature: float, word_share: float) -> Floats:
    """p(class) [B, F]: both heads' opinions, averaged."""
    class_BF = softmax(raw.logits_BF, temperature)
    if word_share:
        class_BF *= np.float32(1.0 - word_share)
        class_BF += np.float32(word_share) * softmax(raw.word_BF, 1.0)
    return class_BF


def mixed_means(fitted: Fitted, mix: Mix) -> Floats:
    """What a class contributes to each expert's expected score [F, M]: its own means and its category's."""
    own, shared = 1.0 - mix.category_share, mix.category_share
    mixed_FM = own * fitted.class_scores_FM + shared * fitted.category_scores_CM[fitted.category_F]
    result: Floats = (np.float32(1.0 - mix.value_share) * mixed_FM).astype(np.float32)
    return result


def members(fitted: Fitted) -> Floats:
    """1 where a class is of a category [F, C]."""
    F = len(fitted.category_F)
    member_FC = np.zeros((F, len(fitted.category_scores_CM)), np.float32)
    member_FC[np.arange(F), fitted.category_F] = 1.0
    return member_FC


def others(fitted: Fitted) -> Floats:
    """1 for every expert but the general one [M]."""
    other_M = np.ones_like(fitted.mean_M)
    other_M[fitted.general] = 0.0
    return other_M


class Ready:
    """A path made ready for one prompt at a time: the arithmetic of ``assess`` in one call. Shares nothing that changes."""

    def __init__(self, fitted: Fitted, mix: Mix, gate: Gate, *, native: bool = True) -> None:
        """Fold what no prompt changes: the mix into the tables, both tables into one. ``native`` False asks for numpy."""
        F, end = len(fitted.category_F), len(fitted.category_F) + len(fitted.mean_M)
        word = end + fitted.num_directions
        width = fitted.heads_DH.shape[1] if mix.asks_words else word
        weights_DH = fitted.heads_DH[:, :width].copy()
        weights_DH[:, F:end] *= np.float32(mix.value_share)
        bias_H = fitted.bias_H[:width].copy()
        bias_H[F:end] *= np.float32(mix.value_share)
        table_FX = np.ascontiguousarray(np.concatenate([mixed_means(fitted, mix), members(fitted)], axis=1))
        plain_FM = np.ascontiguousarray(fitted.plain_scores_FM if mix.holds else np.zeros((0, 0)), np.float32)
        module = build.load() if native else None
        self._native = None
        if module is not None:
            self._native = module.Heads(
                np.ascontiguousarray(weights_DH, np.float32),
                np.ascontiguousarray(bias_H, np.float32),
                table_FX,
                np.ascontiguousarray(fitted.mean_M, np.float32),
                plain_FM,
                np.ascontiguousarray(fitted.likeness.centres_FK, np.float32),
                np.ascontiguousarray(fitted.likeness.bias_F, np.float32),
                fitted.general,
                mix.asks_words,
                mix.hold,
                mix.strange_hold,
                mix.word_share,
                float(np.float32(1.0 / fitted.temperature)),
                mix.trust,
                gate.weight,
                gate.bias,
                gate.caution,
                gate.caution_below,
            )
        # A row of ones behind the embedding's numbers would save one call and cost a copy of the embedding.
        self._weights_HD = np.ascontiguousarray(weights_DH.T)
        self._bias_H = bias_H
        self._table_FX = table_FX
        self._mean_M = fitted.mean_M
        self._num_classes, self._num_experts, self._end = F, len(fitted.mean_M), end
        self._word = word
        self._likeness = fitted.likeness
        self._mix = mix
        self._plain_FM = plain_FM
        self._cooling = np.float32(1.0 / fitted.temperature)
        self._trust = np.float32(mix.trust)
        self._other_M = others(fitted)
        self._gate = gate

    def assess(self, embedding_D: Floats, threshold: float) -> tuple[list[float], list[float], list[float], float]:
        """p(category), expected scores, leads and familiarity of one prompt; below ``threshold`` scores are drawn to the means."""
        if self._native is not None:
            return cast("tuple[list[float], list[float], list[float], float]", self._native.assess(embedding_D, threshold))
        found_H = self._weights_HD @ embedding_D
        found_H += self._bias_H
        logits_F = found_H[: self._num_classes]
        signal = float(self._likeness.signal(found_H[None, self._end : self._word], logits_F[None])[0])
        logits_F -= logits_F[logits_F.argmax()]
        logits_F *= self._cooling
        class_F = np.exp(logits_F, out=logits_F)
        mix = self._mix
        class_F *= np.float32((1.0 - mix.word_share) / float(np.add.reduce(class_F)))
        word_F = found_H[self._word :]
        if mix.asks_words:
            word_F -= word_F[word_F.argmax()]
            np.exp(word_F, out=word_F)
            word_F *= np.float32(1.0 / float(np.add.reduce(word_F)))
            class_F += np.float32(mix.word_share) * word_F
        mixed_X = class_F @ self._table_FX
        scores_M = mixed_X[: self._num_experts]
        scores_M += found_H[self._num_classes : self._end]
        logit = min(max(self._gate.weight * signal + self._gate.bias, -_MAX_LOGIT), _MAX_LOGIT)
        familiarity = 1.0 / (1.0 + math.exp(-logit))
        strange = max(0.0, 1.0 - familiarity / self._gate.caution_below)
        leads_M = np.zeros_like(scores_M)
        if mix.holds:
            plain_M = word_F @ self._plain_FM
            leads_M += np.float32(mix.strange_hold if strange else mix.hold) * (plain_M < plain_M.max() - _TIE)
        if familiarity < threshold:
            scores_M = self._mean_M + self._trust * (scores_M - self._mean_M)
        if self._gate.caution and strange:
            leads_M += np.float32(self._gate.caution * strange) * self._other_M
        return mixed_X[self._num_experts :].tolist(), scores_M.tolist(), leads_M.tolist(), familiarity
