from dataclasses import replace
from typing import Any

import pytest

from antiphon.coe.routing.decision import (
    EVERYONE_IDLE,
    Decision,
    ExpertState,
    Judgement,
    PolicyTerms,
    Question,
    Reason,
    View,
    decide,
)
from antiphon.core.document.composition import CompositionSpec
from antiphon.core.errors import InvalidInput, Unavailable

NAMES = ("big", "coder", "tiny")
TERMS = PolicyTerms(cost={}, experts=frozenset(NAMES))


def _spec(**more: Any) -> CompositionSpec:
    experts = [
        {"name": "big", "deploymentRef": "big", "contextTokens": 32_000, "tools": True, "modalities": ["text", "image"]},
        {"name": "coder", "deploymentRef": "coder", "contextTokens": 8_000},
        {"name": "tiny", "deploymentRef": "tiny", "contextTokens": 2_000},
    ]
    return CompositionSpec.model_validate({"experts": experts, "general": "big", **more})


def _judgement(gated: bool = False, **scores: float) -> Judgement:
    return Judgement(
        category="code",
        confidence=0.9,
        familiarity=0.1 if gated else 0.9,
        gated=gated,
        slow=False,
        probabilities={"code": 0.9, "chat": 0.1},
        scores={"big": 0.6, "coder": 0.8, "tiny": 0.3, **scores},
    )


def _decide(
    question: Question | None = None, judgement: Judgement | None = None, view: View = EVERYONE_IDLE, **more: Any
) -> Decision:
    sticky = more.pop("sticky", None)
    return decide(question or Question(prompt="p"), judgement or _judgement(), _spec(**more), TERMS, view, sticky)


def test_the_best_score_wins_and_the_next_is_runner_up() -> None:
    decision = _decide()
    assert (decision.expert, decision.reason, decision.runner_up) == ("coder", Reason.SCORE, "big")


def test_an_uncertain_prompt_goes_to_the_general_expert() -> None:
    decision = _decide(judgement=_judgement(gated=True))
    assert (decision.expert, decision.reason) == ("big", Reason.UNCERTAIN)


def test_cost_counts_only_for_what_is_familiar_enough_and_parts_equals_elsewhere() -> None:
    def expert(cost_from: float, tie_cost: dict[str, float]) -> str:
        terms = PolicyTerms(cost={"coder": 0.5}, experts=frozenset(NAMES), cost_from=cost_from, tie_cost=tie_cost)
        return decide(Question(prompt="p"), _judgement(), _spec(), terms, EVERYONE_IDLE).expert  # familiarity 0.9

    assert (expert(0.8, {}), expert(0.95, {})) == ("big", "coder")
    assert expert(0.95, {"coder": 0.5}) == "big"


def test_an_expert_named_by_the_request_comes_before_everything() -> None:
    decision = _decide(Question(prompt="p", expert="tiny"), rules=[{"name": "r", "when": {"language": "de"}, "expert": "big"}])
    assert (decision.expert, decision.reason) == ("tiny", Reason.EXPLICIT)


def test_an_unknown_or_hidden_expert_looks_the_same() -> None:
    for question in (Question(prompt="p", expert="nobody"), Question(prompt="p", expert="tiny", allowed=frozenset({"big"}))):
        with pytest.raises(InvalidInput, match="there is no expert"):
            _decide(question)


@pytest.mark.parametrize(
    ("when", "question"),
    [
        ({"category": "law"}, Question(prompt="p", category="law")),
        ({"header": "x-team", "value": "red"}, Question(prompt="p", headers={"x-team": "red"})),
        ({"header": "x-team"}, Question(prompt="p", headers={"x-team": "blue"})),
        ({"language": "de"}, Question(prompt="p", language="de")),
        ({"minContextTokens": 100}, Question(prompt="p", context_tokens=100)),
        ({"maxContextTokens": 100}, Question(prompt="p", context_tokens=100)),
    ],
)
def test_a_rule_that_matches_decides_and_one_that_does_not_is_passed_by(when: dict[str, Any], question: Question) -> None:
    rules = [{"name": "r", "when": when, "expert": "tiny"}]
    assert _decide(question, rules=rules).reason is Reason.RULE
    other = Question(prompt="p", headers={"x-other": "1"}, context_tokens=0 if "minContextTokens" in when else 500)
    assert _decide(other, rules=rules).reason is Reason.SCORE


def test_a_category_can_be_mapped_for_good() -> None:
    decision = _decide(categories=[{"name": "code", "expert": "tiny"}])
    assert (decision.expert, decision.reason) == ("tiny", Reason.CATEGORY)


def test_context_modality_and_tools_filter_experts() -> None:
    assert _decide(Question(prompt="p", context_tokens=10_000)).reason is Reason.ONLY_CHOICE
    assert _decide(Question(prompt="p", modalities=("text", "image"))).expert == "big"
    assert _decide(Question(prompt="p", tools=True)).expert == "big"
    with pytest.raises(InvalidInput, match="context"):
        _decide(Question(prompt="p", context_tokens=50_000))


def test_nobody_healthy_is_unavailable() -> None:
    down = View(experts={name: ExpertState(healthy=False) for name in NAMES})
    with pytest.raises(Unavailable):
        _decide(view=down)


def test_an_expert_that_is_down_falls_back_with_its_reason() -> None:
    view = View(experts={"big": ExpertState(healthy=False)})
    decision = _decide(judgement=_judgement(gated=True), view=view, fallbacks=["tiny"])
    assert (decision.expert, decision.reason) == ("tiny", Reason.FALLBACK)
    assert "unhealthy" in decision.detail


def test_expected_wait_and_loading_weigh_against_quality() -> None:
    busy = View(experts={"coder": ExpertState(expected_wait_s=200.0)})
    assert _decide(view=busy).expert == "big"
    absent = View(experts={"coder": ExpertState(resident=False, load_s=200.0)})
    assert _decide(view=absent).expert == "big"


def test_a_session_stays_while_that_costs_little() -> None:
    close = _judgement(big=0.78)
    assert _decide(judgement=close, sticky="big").reason is Reason.STICKY
    assert _decide(judgement=_judgement(), sticky="big").reason is Reason.SCORE
    assert _decide(judgement=close, sticky="big", stickiness={"enabled": False}).reason is Reason.SCORE


def test_alternatives_are_fallbacks_then_runner_up_then_general() -> None:
    assert _decide(fallbacks=["tiny"]).alternatives == ("tiny", "big")


def test_without_a_judgement_the_general_expert_serves() -> None:
    decision = decide(Question(prompt="p"), None, _spec(), TERMS, EVERYONE_IDLE)
    assert (decision.expert, decision.reason) == ("big", Reason.NO_ROUTER)


def test_a_lead_out_of_reach_outweighs_what_is_expected_and_no_wait_nor_worse_feedback() -> None:
    held = replace(_judgement(), leads={"coder": 1.0, "tiny": 1.0})
    assert _decide(judgement=held).expert == "big"
    waiting = View(experts={"big": ExpertState(expected_wait_s=60.0)})
    assert _decide(judgement=held, view=waiting, policy={"name": "quality", "waitWeight": 0.01}).expert == "coder"
    assert _decide(judgement=held, sticky="coder", stickiness={"enabled": True, "margin": 0.01}).expert == "coder"
    disliked = replace(held, scores={**held.scores, "big": 0.5}, learnt={"big": -0.1})
    assert _decide(judgement=disliked).expert == "coder"
