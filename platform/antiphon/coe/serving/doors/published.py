"""What the compositions' door adds to ``/openapi.json``, and the paths it has (values). Must not know: how it answers."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from antiphon.gateway.web.openapi import Operation


class RouteBody(BaseModel):
    """A chat's or a completion's body; only what it asks counts."""

    model: str = Field(description="coe/<name> or coe/<name>:<policy>")
    messages: list[dict[str, Any]] | None = None
    prompt: Any = None


class Candidate(BaseModel):
    """An expert as the router saw it."""

    expert: str
    score: float
    cost: float
    wait: float
    total: float | None
    blocked_by: str | None


class Decision(BaseModel):
    """Who answers, and why."""

    decision_id: str
    expert: str
    reason: str
    detail: str
    policy: str
    runner_up: str | None
    alternatives: list[str]
    category: str | None
    confidence: float
    familiarity: float
    slow_path: bool
    probabilities: dict[str, float]
    candidates: list[Candidate]
    artifact: str | None
    view_version: int


class Replay(BaseModel):
    """Whom another policy would have chosen."""

    policy: str | None
    expert: str
    reason: str


class Explained(Decision):
    """A decision that was made."""

    composition: str
    decided_s: float
    asked: list[dict[str, Any]] | dict[str, Any] | None = None
    replay: Replay | None = None


class ExpertCard(BaseModel):
    """An expert and how it stands."""

    composition: str
    name: str
    external: bool
    general: bool
    active_params_b: float | None
    context_tokens: int | None
    modalities: list[str]
    tools: bool
    healthy: bool
    resident: bool
    load_s: float
    num_waiting: int
    expected_wait_s: float | None


class ExpertList(BaseModel):
    """Experts of all compositions."""

    object: Literal["list"]
    data: list[ExpertCard]


class CompositionCard(BaseModel):
    """A composition as a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    experts: list[str]


class FeedbackBody(BaseModel):
    """How good an answer was."""

    decision_id: str
    score: float = Field(description="0 to 1")


_TAG: Final = "Compositions"
OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v1/route",
        tag=_TAG,
        summary="Decide who would answer, and ask nobody",
        body=RouteBody,
        answer=Decision,
        example={"model": "coe/NAME", "prompt": "add the numbers 31 and 12"},
    ),
    Operation(method="get", path="/v1/experts", tag=_TAG, summary="Experts and their state", answer=ExpertList),
    Operation(
        method="get",
        path="/v1/decisions/{decision_id}",
        tag=_TAG,
        summary="Explain a decision",
        answer=Explained,
        query={"policy": "Replay it by this policy."},
    ),
    Operation(
        method="post",
        path="/v1/feedback",
        tag=_TAG,
        summary="Say how good an answer was",
        body=FeedbackBody,
        answer=FeedbackBody,
        example={"decision_id": "ID", "score": 1.0},
    ),
    Operation(
        method="get", path="/v1/models/coe/{composition}", tag=_TAG, summary="A composition as a model", answer=CompositionCard
    ),
)


async def _never(_request: Request) -> Response:
    raise AssertionError("only the paths are asked for")


# By which HTTP's manners know the door's paths; the list of models it shares with the door behind it.
ROUTES: Final = (
    *(Route(o.path.replace("{composition}", "{composition:path}"), _never, methods=[o.method.upper()]) for o in OPERATIONS),
    Route("/v1/models", _never, methods=["GET"]),
)
