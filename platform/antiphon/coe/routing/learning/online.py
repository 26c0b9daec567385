"""Bounded updates of expected scores from feedback, and an alarm where the world has moved (request speed, microseconds).

    feedback ─► residual = score − what the artifact expected ─┬─► mean per category and expert ─► shift, shrunken and bounded
                                                               └─► two-sided CUSUM (Page 1954) over all ─► drift alarm

A shift is zero below a number of feedbacks, drawn towards zero as if more of them had shown no residual, and never larger than
the document allows, so that no feedback moves an expert further. Old feedback fades. What was learnt is a function of the
feedbacks in order, so that a log of them brings it back. Must not know: clocks, files, who sent it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from antiphon.coe.routing.decision import Judgement
from antiphon.core.document.composition import LearningSpec

_SLACK = 0.25  # of the CUSUM, in standard deviations: drifts of half of one are found soonest
_MIN_VARIANCE = 0.02  # of a score: experts that are expected to be always right still err


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """How good an answer was, beside what the artifact had expected of it."""

    category: str
    expert: str
    expected: float  # by the artifact alone
    score: float


@dataclass(slots=True)
class _Mean:
    """A fading sum of residuals."""

    count: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What learning from feedbacks in order would have changed."""

    num_feedbacks: int
    error_before: float  # mean squared error of the artifact's expectation
    error_after: float  # the same with what had been learnt until each one came
    num_alarms: int
    shifts: dict[tuple[str, str], float]


class OnlineLearner:
    """What one router has learnt. Not safe between threads: its router's lock guards it."""

    def __init__(self, spec: LearningSpec) -> None:
        self._spec = spec
        self._means: dict[tuple[str, str], _Mean] = {}
        self._up = self._down = 0.0
        self.num_feedbacks = 0
        self.num_alarms = 0

    @property
    def drift(self) -> float:
        """The larger CUSUM, in standard deviations; at the document's alarm it is counted and begins anew."""
        return max(self._up, self._down)

    def shift(self, category: str, expert: str) -> float:
        """What is added to the artifact's expectation."""
        mean = self._means.get((category, expert))
        if mean is None or mean.count < self._spec.min_feedback:
            return 0.0
        found = mean.total / (mean.count + self._spec.prior_feedback)
        return min(max(found, -self._spec.max_shift), self._spec.max_shift)

    def adjusted(self, judgement: Judgement) -> Judgement:
        """The judgement with what was learnt, each category by its probability; it says what was added."""
        if not self._means:
            return judgement
        learnt = {
            expert: sum(p * self.shift(category, expert) for category, p in judgement.probabilities.items())
            for expert in judgement.scores
        }
        learnt = {expert: shift for expert, shift in learnt.items() if shift}
        if not learnt:
            return judgement
        scores = {expert: score + learnt.get(expert, 0.0) for expert, score in judgement.scores.items()}
        return replace(judgement, scores=scores, learnt=learnt)

    def learn(self, feedback: Feedback) -> bool:
        """Take one in; True when it raised the drift alarm."""
        mean = self._means.setdefault((feedback.category, feedback.expert), _Mean())
        kept = 1.0 - 1.0 / self._spec.memory
        residual = feedback.score - feedback.expected
        mean.count = kept * mean.count + 1.0
        mean.total = kept * mean.total + residual
        self.num_feedbacks += 1
        expected = min(max(feedback.expected, 0.0), 1.0)
        deviations = residual / math.sqrt(max(expected * (1.0 - expected), _MIN_VARIANCE))
        self._up = max(0.0, self._up + deviations - _SLACK)
        self._down = max(0.0, self._down - deviations - _SLACK)
        if self.drift < self._spec.drift_alarm:
            return False
        self.num_alarms += 1
        self._up = self._down = 0.0
        return True

    def shifts(self) -> dict[tuple[str, str], float]:
        """Every shift that is not zero, by category and expert."""
        found = {key: self.shift(*key) for key in sorted(self._means)}
        return {key: shift for key, shift in found.items() if shift}


def replayed(spec: LearningSpec, feedbacks: Iterable[Feedback]) -> Replayed:
    """Learn from feedbacks in order, judging each before it is learnt from (prequential, Dawid 1984)."""
    learner = OnlineLearner(spec)
    before = after = 0.0
    for feedback in feedbacks:
        shift = learner.shift(feedback.category, feedback.expert)
        before += (feedback.score - feedback.expected) ** 2
        after += (feedback.score - feedback.expected - shift) ** 2
        learner.learn(feedback)
    num = max(1, learner.num_feedbacks)
    return Replayed(
        num_feedbacks=learner.num_feedbacks,
        error_before=before / num,
        error_after=after / num,
        num_alarms=learner.num_alarms,
        shifts=learner.shifts(),
    )
