"""What gateways tell each other, and experts that share memory, about a composition."""

from typing import Any

import pytest

from antiphon.coe.routing.decision import Candidate, Decision, Reason
from antiphon.coe.serving.expert_health import ExpertHealth, Report, experts_topic
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.directory.memory import MemoryDirectory


def _document(**spec: Any) -> CompositionOfExperts:
    return CompositionOfExperts.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "CompositionOfExperts",
            "metadata": {"name": "team"},
            "spec": {"experts": [{"name": n, "deploymentRef": n} for n in "ab"], "general": "a", **spec},
        }
    )


def _health(document: CompositionOfExperts, notes: MemoryDirectory, now: list[float]) -> ExpertHealth:
    return ExpertHealth(
        document,
        models={"a": "a", "b": "b"},
        endpoints={},
        workers=tuple,
        notes=notes,
        owner="gateway",
        clock=lambda: now[0],
    )


def _decision() -> Decision:
    candidates = tuple(Candidate(expert=e, score=t, cost=0.0, wait=0.0, total=t) for e, t in (("a", 0.9), ("b", 0.1)))
    return Decision(
        expert="a", reason=Reason.SCORE, detail="", policy="quality", runner_up="b", alternatives=("b",), candidates=candidates
    )


async def test_what_decisions_let_expect_is_noted_where_experts_share_memory() -> None:
    notes, now = MemoryDirectory(), [0.0]
    health = _health(_document(tiers={"residentMemory": "1Gi"}), notes, now)
    for second in range(200):
        now[0] = float(second)
        health.expect(_decision())
    await health.refresh()
    report = Report.from_json((await notes.notes(experts_topic("team")))["gateway"])
    assert report.expected == {"a": pytest.approx(1.0, rel=0.05)}


async def test_nothing_is_forecast_where_each_expert_has_memory_of_its_own() -> None:
    notes = MemoryDirectory()
    health = _health(_document(), notes, [0.0])
    health.expect(_decision())
    await health.refresh()
    assert "expected" not in (await notes.notes(experts_topic("team")))["gateway"]


def test_a_note_of_an_older_gateway_is_read() -> None:
    assert Report.from_json('{"open":["a"],"running":{"b":2}}') == Report(open=frozenset("a"), running={"b": 2})
