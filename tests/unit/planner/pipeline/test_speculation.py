"""A plan with drafts: rows and tokens of a step against the closed form, and against the plan without."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.core.errors import InvalidInput
from antiphon.planner.pipeline.speculation import Speculation, tokens_of_step


def deploy(*more: str) -> Any:
    arguments = ["deploy", "--model", "deepseek-v3", "--hardware", "H800", "--gpus", "64", "--context", "4096", *more, "--json"]
    return list(json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)["options"].values())


@pytest.mark.parametrize(("drafts", "acceptance"), [(1, 0.8), (3, 0.6), (4, 0.0), (5, 0.95)])
def test_tokens_of_a_step_are_the_mean_over_all_outcomes(drafts: int, acceptance: float) -> None:
    mean = 0.0
    for outcome in itertools.product((True, False), repeat=drafts):
        chance = 1.0
        for taken in outcome:
            chance *= acceptance if taken else 1 - acceptance
        mean += chance * (1 + (outcome.index(False) if False in outcome else drafts))
    assert Speculation(drafts=drafts, acceptance=acceptance).tokens() == pytest.approx(mean)
    assert Speculation(drafts=drafts, acceptance=acceptance).rows == 1 + drafts
    tokens_of_step.check_units()


def test_drafts_are_rows_of_the_step_and_their_tokens_shorten_the_time_per_token() -> None:
    plain, drafted = deploy("--tpot-ms", "50"), deploy("--tpot-ms", "50", "--drafts", "2", "--acceptance", "0.8")
    for option in drafted:
        speculation = option["speculation"]
        assert speculation["rows_per_request"] == 3
        assert speculation["tokens_per_step"] == pytest.approx(1 + 0.8 + 0.64)
        requests = option["rows_per_ubatch"] / 3
        assert requests == int(requests)
        assert option["tpot_ms"] <= 50
        # A group's rate is its requests over the time per token: every request has a token each so often.
        ranks = option["attention_cards"] / option["attention_tensor"]
        per_group = ranks * option["num_ubatches"] * requests / (option["tpot_ms"] / 1e3)
        assert option["tokens_per_s"] <= option["num_groups"] * per_group * (1 + 1e-9)
    assert all(option["speculation"] is None for option in plain)


def test_drafts_that_are_never_taken_only_cost_and_making_them_costs_their_share() -> None:
    arguments = ("--tpot-ms", "1000", "--output-tokens", "512")

    def best(*more: str) -> float:
        return max(float(option["tokens_per_s"]) for option in deploy(*arguments, *more))

    plain = best()
    wrong = best("--drafts", "2", "--acceptance", "0")
    right = best("--drafts", "2", "--acceptance", "0.9")
    dear = best("--drafts", "2", "--acceptance", "0.9", "--drafting", "0.5")
    assert wrong < plain
    assert wrong < dear < right


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--drafts", "2"), "acceptance"),
        (("--acceptance", "0.5"), "drafts"),
        (("--drafting", "0.5"), "drafting"),
    ],
)
def test_halves_of_the_question_are_refused_by_name(arguments: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        CliRunner().invoke(app, ["deploy", "--model", "deepseek-v3", "--gpus", "8", *arguments], catch_exceptions=False)
    assert refused.value.field == field
