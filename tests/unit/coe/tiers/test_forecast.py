import pytest

from antiphon.coe.routing.decision import Candidate, Decision, Reason
from antiphon.coe.tiers.forecast import Forecast, shares_of


def _decision(reason: Reason, **totals: float) -> Decision:
    return Decision(
        expert="a",
        reason=reason,
        detail="",
        policy="quality",
        runner_up=None,
        alternatives=(),
        candidates=tuple(Candidate(expert=e, score=t, cost=0.0, wait=0.0, total=t) for e, t in totals.items()),
    )


def test_a_steady_stream_is_forecast_at_its_rate() -> None:
    forecast = Forecast(half_life_s=10.0)
    for i in range(400):
        forecast.observe({"a": 0.75, "b": 0.25}, i * 0.5)
    expected = forecast.expected(199.5)
    assert expected["a"] == pytest.approx(1.5, rel=0.05)
    assert expected["b"] == pytest.approx(0.5, rel=0.05)


def test_a_forecast_halves_in_its_half_life() -> None:
    later = Forecast(half_life_s=10.0)
    later.observe({"a": 1.0}, 0.0)
    at_once = later.expected(0.0)["a"]
    assert later.expected(10.0)["a"] == pytest.approx(at_once / 2)


def test_close_experts_share_a_decision_of_score_and_no_other() -> None:
    shares = shares_of(_decision(Reason.SCORE, a=0.60, b=0.59, c=0.20))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["a"] > shares["b"] > 0.2
    assert "c" not in shares
    assert shares_of(_decision(Reason.EXPLICIT, a=0.6, b=0.59)) == {"a": 1.0}
