"""Tenants of one composition learn nothing of each other's conversations."""

from __future__ import annotations

from antiphon.coe.routing.decision import EVERYONE_IDLE, Question
from antiphon.coe.serving.artifacts import WatchedRoutes
from antiphon.coe.serving.doors.question import question_of
from antiphon.core.document.composition import CompositionOfExperts

DOCUMENT = CompositionOfExperts.model_validate(
    {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "team"},
        "spec": {"experts": [{"name": "a", "deploymentRef": "a"}, {"name": "b", "deploymentRef": "b"}], "general": "a"},
    }
)


def asked(tenant: str) -> Question:
    return question_of({"prompt": "x"}, {"x-antiphon-session": "s"}, DOCUMENT.spec, None, tenant=tenant)


def test_equal_names_of_sessions_are_other_sessions_for_each_tenant() -> None:
    assert asked("").session == "s"
    assert len({asked("").session, asked("red").session, asked("blue").session}) == 3
    assert asked("red").session == asked("red").session


async def test_the_id_of_a_decision_cannot_be_worked_out_from_what_was_asked() -> None:
    """Else whoever guesses a prompt is told whether anybody has sent it."""
    ids = {(await WatchedRoutes(DOCUMENT, "host:1").route(asked("red"), EVERYONE_IDLE, None)).decision_id for _ in range(2)}
    assert len(ids) == 2
