from dataclasses import replace

import numpy as np
import pytest

from antiphon.coe.judging.comparisons import COMPARISONS
from antiphon.coe.judging.judge import CurvePoint, Estimate, Judged, Verdict
from antiphon.coe.judging.plots import plots
from antiphon.coe.judging.report import DatasetFigures, PolicyFigures, Report
from antiphon.coe.judging.tables import dataset_rows, policy_rows, policy_tables, rows_for_people

SCORES = {"router": 0.7, "best single": 0.6, "simple": 0.65, "kNN-100": 0.65, "ridge": 0.64, "oracle": 0.8, "random": 0.4}
NONE = Estimate(mean=0.0, low=0.0, high=0.0)


@pytest.fixture
def found() -> tuple[Report, Judged]:
    source = np.random.default_rng(0)
    confidence = source.uniform(0.3, 1.0, 200)
    true = source.integers(-1, 3, 200)  # some rows have no category
    verdict = Verdict(
        score_B=confidence,
        single_B=confidence,
        gated_B=confidence > 2,
        slow_B=confidence > 2,
        cost_B=confidence,
        category_B=np.where(source.random(200) < confidence, np.maximum(true, 0), 2),
        confidence_B=confidence,
        expected_B=confidence,
        policies={},
        simple_policies={},
        comparisons={},
        advantage_B=confidence,
        comparison_advantages={},
    )
    curve = (CurvePoint(weight=0.0, avg_cost=40.0, score=0.7), CurvePoint(weight=0.1, avg_cost=12.0, score=0.6))
    report = Report(
        table={},
        scores=SCORES,
        left_out_kind=None,
        scores_left_out={},
        experts={"small | odd name": (7.0, 0.5), "large": (70.0, 0.6)},
        over_best_single=NONE,
        cost_at_single_quality=12.0,
        single_cost=70.0,
        cost_unit="1e9 active parameters",
        curve=curve,
        aiq=0.65,
        left_out=None,
        left_out_by_dataset={},
        policies={
            "quality": PolicyFigures(
                score=0.7,
                avg_cost=40.0,
                over_single=NONE,
                over=dict.fromkeys((*COMPARISONS, "oracle"), NONE),
                over_simple_alike=NONE,
                utility_over_simple_alike=NONE,
            )
        },
        policies_left_out={},
        by_dataset={
            "d": DatasetFigures(
                num_rows=200, router=0.7, single=0.6, simple=0.65, left_out=None, left_out_single=None, left_out_simple=None
            )
        },
        expected=0.71,
        expected_left_out=None,
        score_left_out=None,
        gate_rate=0.0,
        gate_rate_left_out=None,
        slow_rate=0.0,
        agreement={},
        category_accuracy=0.9,
        calibration_error=0.02,
        two_models={},
        two_models_left_out={},
    )
    judged = Judged(verdict=verdict, true_category_B=true, curve=curve, agreement={})
    return report, judged


def test_equal_figures_give_equal_plots(found: tuple[Report, Judged]) -> None:
    report, judged = found
    first = plots(report, judged, ("code", "math", "other"))
    assert first == plots(report, judged, ("code", "math", "other"))
    assert set(first) == {"quality-cost.png", "calibration.png", "confusion.png"}
    assert all(data.startswith(b"\x89PNG") for data in first.values())


def test_what_was_not_judged_is_not_shown(found: tuple[Report, Judged]) -> None:
    shown = dict(rows_for_people(found[0]))
    assert shown["cost at best single's quality"] == "12.0B"
    assert "against best single, dataset unseen" not in shown


def test_every_policy_has_a_line_with_its_intervals_and_every_dataset_has_one(found: tuple[Report, Judged]) -> None:
    head, *rows = policy_rows(found[0])
    assert head[4:] == ("− best single", "− simple", "− kNN-100", "− ridge", "− oracle", "− simple, same policy", "less its cost")
    assert rows[0] == ("quality", "five folds", "0.7000", "40.0", *["+0.00 [+0.00, +0.00]"] * 7)
    assert [(name, how, score) for name, how, score, *_ in rows[1:]] == [
        (f"({name})", "five folds", f"{score:.4f}") for name, score in SCORES.items() if name != "router"
    ]
    assert dataset_rows(found[0])[1] == ("d", "200", "0.700", "0.600", "0.650", "–", "–", "–")


def test_policies_fit_a_terminal_of_80_columns(found: tuple[Report, Judged]) -> None:
    wide = Estimate(mean=-0.1368, low=-0.1453, high=-0.1284)
    policy = replace(found[0].policies["quality"], over_single=wide, over=dict.fromkeys(SCORES, wide))
    report = replace(found[0], policies=dict.fromkeys(("quality", "balanced", "cheap"), policy), left_out_kind="dataset")
    [(title, rows)] = policy_tables(report)
    assert "five folds" in title
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 80  # as it is printed: two spaces between columns
    assert rows[0] == ("", "quality", "balanced", "cheap")
    assert rows[3] == ("single 0.6000", *["-13.7 [-14.5, -12.8]"] * 3)


def test_what_was_left_out_is_named(found: tuple[Report, Judged]) -> None:
    report = replace(found[0], left_out_kind="category", policies_left_out=found[0].policies, scores_left_out=SCORES)
    assert {how for _, how, *_ in policy_rows(report)[1:]} == {"five folds", "category unseen"}
