from pathlib import Path

import numpy as np
import pytest

from antiphon.coe.routing.decision import Judgement
from antiphon.coe.routing.learning.log import append_feedback, read_feedback
from antiphon.coe.routing.learning.online import Feedback, OnlineLearner, replayed
from antiphon.core.document.composition import LearningSpec


def said(score: float, expected: float = 0.5, expert: str = "small") -> Feedback:
    return Feedback(category="sums", expert=expert, expected=expected, score=score)


def judged(**scores: float) -> Judgement:
    return Judgement(
        category="sums",
        confidence=0.75,
        familiarity=1.0,
        gated=False,
        slow=False,
        probabilities={"sums": 0.75, "code": 0.25},
        scores=scores,
    )


def test_nothing_moves_before_the_floor_and_nothing_beyond_the_bound() -> None:
    learner = OnlineLearner(LearningSpec(max_shift=0.05, min_feedback=20, prior_feedback=50.0))
    for _ in range(19):
        learner.learn(said(1.0))
    assert learner.shift("sums", "small") == 0.0
    for _ in range(2000):
        learner.learn(said(1.0))
    assert learner.shift("sums", "small") == 0.05
    assert learner.shift("code", "small") == 0.0


def test_a_shift_is_drawn_to_zero_by_the_prior() -> None:
    learner = OnlineLearner(LearningSpec(max_shift=0.5, min_feedback=1, prior_feedback=50.0, memory=1e9))
    for _ in range(50):
        learner.learn(said(0.9))
    assert learner.shift("sums", "small") == pytest.approx(50 * 0.4 / (50 + 50), abs=1e-6)


def test_a_judgement_is_moved_by_the_probability_of_its_categories_and_says_so() -> None:
    learner = OnlineLearner(LearningSpec(max_shift=0.1, min_feedback=1, prior_feedback=0.0))
    plain = judged(small=0.5, large=0.6)
    assert learner.adjusted(plain) is plain
    learner.learn(said(1.0))
    moved = learner.adjusted(plain)
    assert moved.scores == {"small": pytest.approx(0.575), "large": 0.6}
    assert moved.learnt == {"small": pytest.approx(0.075)}


def test_scores_as_expected_raise_no_alarm_and_a_drop_raises_one_soon() -> None:
    source = np.random.default_rng(0)
    learner = OnlineLearner(LearningSpec())
    assert learner.drift == 0.0
    steady = [learner.learn(said(float(source.random() < 0.7), expected=0.7)) for _ in range(5000)]
    assert not any(steady)
    dropped = [learner.learn(said(float(source.random() < 0.3), expected=0.7)) for _ in range(100)]
    assert learner.num_alarms >= 1
    assert dropped.index(True) < 60


def test_a_log_brings_back_what_was_learnt(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    assert read_feedback(path) == []
    feedbacks = [said(score) for score in (0.0, 1.0, 1.0)]
    for feedback in feedbacks:
        append_feedback(path, feedback)
    path.write_text(path.read_text() + '{"category": "su')
    assert read_feedback(path) == feedbacks


def test_replay_says_whether_learning_was_for_the_better() -> None:
    source = np.random.default_rng(1)
    spec = LearningSpec(max_shift=0.2)
    moved = replayed(spec, [said(float(source.random() < 0.7)) for _ in range(1000)])
    assert moved.error_after < moved.error_before - 0.01
    assert moved.shifts[("sums", "small")] == pytest.approx(0.2, abs=0.05)
    still = replayed(spec, [said(float(source.random() < 0.5)) for _ in range(1000)])
    assert abs(still.error_after - still.error_before) < 0.005
