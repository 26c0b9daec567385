import json
from pathlib import Path

import numpy as np
import pytest

from antiphon.coe.judging.checks import checks_from
from antiphon.core.errors import InvalidInput


def _written(path: Path, weight: float, bias: float, num: int = 4000) -> Path:
    source = np.random.default_rng(0)
    logprobs = -source.exponential(1.0, num)
    good = source.random(num) < 1 / (1 + np.exp(-(weight * logprobs + bias)))
    lines = [
        json.dumps({"expert": "small", "mean_logprob": float(logprob), "score": float(score)})
        for logprob, score in zip(logprobs, good, strict=True)
    ]
    path.write_text("\n".join(lines))
    return path


def test_a_check_finds_the_line_that_the_answers_were_drawn_from(tmp_path: Path) -> None:
    (check,) = checks_from(_written(tmp_path / "answers.jsonl", 2.0, 1.5), 0.7)
    assert check.weight == pytest.approx(2.0, abs=0.25)
    assert check.bias == pytest.approx(1.5, abs=0.2)
    assert check.calibration_error < 0.04
    assert check.accepted_score is not None
    assert check.accepted_score > max(0.7, check.mean_score)


def test_probabilities_that_tell_nothing_or_the_wrong_way_round_accept_by_the_mean_alone(tmp_path: Path) -> None:
    (check,) = checks_from(_written(tmp_path / "answers.jsonl", -1.0, -1.0), 0.7)
    assert (check.weight, round(1 / (1 + np.exp(-check.bias)), 2)) == (0.0, round(check.mean_score, 2))


def test_few_answers_and_lines_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="20 answers"):
        checks_from(_written(tmp_path / "few.jsonl", 1.0, 0.0, num=20), 0.7)
    (tmp_path / "odd.jsonl").write_text('{"expert": "a", "mean_logprob": 0.5, "score": 1}')
    with pytest.raises(InvalidInput, match=r"odd\.jsonl:1"):
        checks_from(tmp_path / "odd.jsonl", 0.7)
