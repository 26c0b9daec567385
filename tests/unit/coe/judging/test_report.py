import numpy as np
import pytest

from antiphon.coe.judging.judge import CurvePoint, Estimate, Judged, Verdict
from antiphon.coe.judging.report import Report, plots, rows_for_people

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
    )
    curve = (CurvePoint(weight=0.0, avg_cost=40.0, score=0.7), CurvePoint(weight=0.1, avg_cost=12.0, score=0.6))
    report = Report(
        table={},
        scores={"router": 0.7, "best single": 0.6, "oracle": 0.8, "kNN-100": 0.65, "ridge": 0.64, "random": 0.4},
        experts={"small | odd name": (7.0, 0.5), "large": (70.0, 0.6)},
        over_best_single=NONE,
        cost_at_single_quality=12.0,
        single_cost=70.0,
        cost_unit="1e9 active parameters",
        curve=curve,
        aiq=0.65,
        left_out=None,
        left_out_by_dataset={},
        gate_rate=0.0,
        gate_rate_left_out=None,
        slow_rate=0.0,
        agreement={},
        category_accuracy=0.9,
        calibration_error=0.02,
        two_models=None,
    )
    judged = Judged(verdict=verdict, true_category_B=true, curve=curve, agreement={}, baselines={})
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
