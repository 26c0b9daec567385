"""Questions and decisions as messages of antiphon.rpc.v1.Router, and back (request speed). Must not know: who sends them."""

from __future__ import annotations

import math
import re

from antiphon.coe.routing.decision import Block, Candidate, Decision, DecisionId, Judgement, Question, Reason, View
from antiphon.coe.routing.router import Record
from antiphon.core.document.composition import CompositionSpec, Policy, policy_named
from antiphon.core.errors import CorruptMessage, InvalidInput
from antiphon.rpc.v1 import router_pb2 as pb

MAX_SESSION_CHARS = 256
_ROUTER = "router"
_MAX_TEXT_CHARS = 2048  # they travel on in headers
_DECISION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_of(model: str, question: Question, avoided: frozenset[str]) -> pb.RouteRequest:
    """The message of a question; what has no UTF-8 form is replaced, as it is for the embedding."""
    return pb.RouteRequest(
        model=model if question.policy is None else f"{model}:{question.policy}",
        prompt=_clean(question.prompt),
        session=_clean(question.session),
        expert="" if question.expert is None else _clean(question.expert),
        category="" if question.category is None else _clean(question.category),
        language="" if question.language is None else _clean(question.language),
        headers={_clean(name): _clean(value) for name, value in question.headers.items()},
        context_tokens=min(question.context_tokens, 2**32 - 1),
        modalities=question.modalities,
        tools=question.tools,
        allowed_experts=[] if question.allowed is None else sorted(map(_clean, question.allowed)),
        restricted=question.allowed is not None,
        avoided_experts=sorted(avoided),
    )


def question_of(request: pb.RouteRequest, policy: Policy | None) -> Question:
    """The question of a message."""
    restricted = request.restricted or bool(request.allowed_experts)
    return Question(
        prompt=request.prompt,
        session=request.session[:MAX_SESSION_CHARS],
        expert=request.expert or None,
        category=request.category or None,
        language=request.language or None,
        policy=policy,
        headers={key.lower(): value for key, value in request.headers.items()},
        context_tokens=request.context_tokens,
        modalities=tuple(request.modalities) or ("text",),
        tools=request.tools,
        allowed=frozenset(request.allowed_experts) if restricted else None,
    )


def message_of(record: Record, decision: Decision | None = None) -> pb.RouteDecision:
    """The message of a record; ``decision`` instead of the record's own, for a replay."""
    made = record.decision if decision is None else decision
    return pb.RouteDecision(
        decision_id=record.decision_id,
        expert=made.expert,
        reason=made.reason.value,
        detail=made.detail,
        policy=made.policy,
        runner_up=made.runner_up if made.runner_up is not None else "",
        alternatives=made.alternatives,
        category=made.category,
        confidence=made.confidence,
        familiarity=made.familiarity,
        slow_path=made.slow,
        artifact=record.artifact_digest,
        candidates=[
            pb.RouteCandidate(
                expert=c.expert,
                score=c.score,
                cost=c.cost,
                wait=c.wait,
                lead=c.lead,
                total=c.total,
                blocked_by="" if c.block is None else c.block.value,
            )
            for c in made.candidates
        ],
        view_version=record.view.version,
        probabilities={} if record.judgement is None else dict(record.judgement.probabilities),
    )


def decision_of(message: pb.RouteDecision) -> Decision:
    """The decision of a message.

    Raises:
        InvalidInput: it names a policy that is not known here.
        ValueError: it names a reason or block that is not known here.
    """
    return Decision(
        expert=message.expert,
        reason=Reason(message.reason),
        detail=message.detail,
        policy=policy_named(message.policy),
        runner_up=message.runner_up or None,
        alternatives=tuple(message.alternatives),
        category=message.category,
        confidence=message.confidence,
        familiarity=message.familiarity,
        slow=message.slow_path,
        candidates=tuple(
            Candidate(
                expert=c.expert,
                score=c.score,
                cost=c.cost,
                wait=c.wait,
                total=c.total if c.HasField("total") else None,
                block=Block(c.blocked_by) if c.blocked_by else None,
                lead=c.lead,
            )
            for c in message.candidates
        ),
    )


def record_of(message: pb.RouteDecision, question: Question, *, decided_s: float, took_s: float) -> Record:
    """A record as far as a message tells it: the view is known by its version only. Raises like ``decision_of``."""
    decision = decision_of(message)
    judgement = None
    if message.probabilities:
        judgement = Judgement(
            category=decision.category,
            confidence=decision.confidence,
            familiarity=decision.familiarity,
            gated=decision.reason is Reason.UNCERTAIN,
            slow=decision.slow,
            probabilities=dict(message.probabilities),
            scores={candidate.expert: candidate.score for candidate in decision.candidates},
        )
    return Record(
        decision_id=DecisionId(message.decision_id),
        decision=decision,
        question=question,
        judgement=judgement,
        view=View(experts={}, version=message.view_version),
        sticky_expert=None,
        artifact_digest=message.artifact,
        decided_s=decided_s,
        took_s=took_s,
    )


def taken(message: pb.RouteDecision, question: Question, spec: CompositionSpec, *, decided_s: float, took_s: float) -> Record:
    """The record of a message, if it is a decision about the question that an equal composition could have made.

    Raises:
        CorruptMessage: it names experts, reasons or policies that there are none, breaks what the question asks, or has no such id,
            texts or numbers as decisions have.
    """
    try:
        record = record_of(message, question, decided_s=decided_s, took_s=took_s)
    except (ValueError, InvalidInput) as error:
        raise CorruptMessage(_ROUTER, str(error)[:_MAX_TEXT_CHARS]) from error
    decision = record.decision
    known = {expert.name for expert in spec.experts}
    named = [decision.expert, *decision.alternatives, *(candidate.expert for candidate in decision.candidates)]
    if not known.issuperset(named) or (decision.runner_up or decision.expert) not in known or len(named) > 2 * len(known) + 1:
        raise CorruptMessage(_ROUTER, "it names experts that this composition does not have, or one too often")
    asked = {decision.expert, *decision.alternatives}
    if question.allowed is not None and not question.allowed.issuperset(asked):
        raise CorruptMessage(_ROUTER, "it chooses an expert that was not to be asked")
    if _DECISION_ID.fullmatch(record.decision_id) is None:
        raise CorruptMessage(_ROUTER, "a decision has no such id")
    if max(map(len, (decision.detail, decision.category, message.artifact))) > _MAX_TEXT_CHARS:
        raise CorruptMessage(_ROUTER, "a text of it is too long")
    numbers = [decision.confidence, decision.familiarity, decided_s, took_s, *message.probabilities.values()]
    for candidate in decision.candidates:
        numbers += [candidate.score, candidate.cost, candidate.wait, candidate.lead, candidate.total or 0.0]
    if not all(map(math.isfinite, numbers)):
        raise CorruptMessage(_ROUTER, "a number of it is none")
    return record


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()
