"""Makes the checks of a cascade from scored answers: how far an expert's own probabilities tell good ones (control speed, offline).

Platt scaling (Platt 1999): the log-odds of a good answer as a straight line of the mean log-probability of its tokens. What it is
worth is measured on answers that a fold kept from it. Must not know: services, routers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from antiphon.coe.judging.judge import calibration_error
from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text

Doubles = npt.NDArray[np.float64]

MIN_ANSWERS = 30
_NUM_FOLDS = 5
_NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check as a document has it, and how it did on answers that it was not made from."""

    expert: str
    weight: float
    bias: float
    num_answers: int
    mean_score: float
    calibration_error: float
    accepted: float  # share of answers at the asked for chance
    accepted_score: float | None  # their mean score; None = none is accepted


def checks_from(path: Path, accept: float) -> list[Check]:
    """A check per expert of a file of answers, JSON lines ``{"expert", "mean_logprob", "score"}``, score 0..1.

    Raises:
        InvalidInput: the file is no such file, or has too few answers of an expert, or only good or only bad ones.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} can't be read: {error}", "answers") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            expert, logprob, score = _answer(line, f"{path}:{number}")
            found.setdefault(expert, []).append((logprob, score))
    if not found:
        raise InvalidInput(f"{path} has no answers", "answers")
    return [_check(expert, np.array(answers), accept) for expert, answers in found.items()]


def _answer(line: str, where: str) -> tuple[str, float, float]:
    try:
        value = read_json_text(line, unique_keys=True)
        expert, logprob, score = value["expert"], float(value["mean_logprob"]), float(value["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{where}: expected expert, mean_logprob and score: {error}", "answers") from error
    if not isinstance(expert, str) or not math.isfinite(logprob) or logprob > 0 or not 0 <= score <= 1:
        raise InvalidInput(f"{where}: mean_logprob must be at most 0, score between 0 and 1", "answers")
    return expert, logprob, score


def _check(expert: str, answers_B2: Doubles, accept: float) -> Check:
    logprob_B, score_B = answers_B2[:, 0], answers_B2[:, 1]
    good_B = score_B >= 0.5
    if len(score_B) < MIN_ANSWERS or min(int(good_B.sum()), int((~good_B).sum())) < _NUM_FOLDS:
        raise InvalidInput(
            f"expert {expert}: {len(score_B)} answers, {int(good_B.sum())} of them good; a check needs {MIN_ANSWERS}, with at "
            f"least {_NUM_FOLDS} good and {_NUM_FOLDS} bad ones",
            "answers",
        )
    fold = np.empty(len(score_B), np.int64)
    source = np.random.default_rng(0)
    for rows in (np.flatnonzero(good_B), np.flatnonzero(~good_B)):  # each fold has good and bad ones
        fold[source.permutation(rows)] = np.arange(len(rows)) % _NUM_FOLDS
    chance_B = np.empty(len(score_B))
    for f in range(_NUM_FOLDS):
        weight, bias = _line(logprob_B[fold != f], score_B[fold != f])
        chance_B[fold == f] = 1.0 / (1.0 + np.exp(-(weight * logprob_B[fold == f] + bias)))
    weight, bias = _line(logprob_B, score_B)
    taken_B = chance_B >= accept
    return Check(
        expert=expert,
        weight=round(weight, 4),
        bias=round(bias, 4),
        num_answers=len(score_B),
        mean_score=float(score_B.mean()),
        calibration_error=calibration_error(chance_B, good_B, _NUM_BINS),
        accepted=float(taken_B.mean()),
        accepted_score=float(score_B[taken_B].mean()) if taken_B.any() else None,
    )


def _line(logprob_B: Doubles, score_B: Doubles) -> tuple[float, float]:
    """Weight and bias; a score between 0 and 1 counts as that share of a good answer and the rest of a bad one."""
    model = LogisticRegression(C=100.0)
    model.fit(
        np.concatenate([logprob_B, logprob_B])[:, None],
        np.repeat([1, 0], len(score_B)),
        sample_weight=np.concatenate([score_B, 1.0 - score_B]),
    )
    # A weight below zero would take what an expert is unsure of for good.
    if model.coef_[0, 0] <= 0.0:
        mean = min(max(float(score_B.mean()), 1e-3), 1 - 1e-3)
        return 0.0, math.log(mean / (1 - mean))
    return float(model.coef_[0, 0]), float(model.intercept_[0])
