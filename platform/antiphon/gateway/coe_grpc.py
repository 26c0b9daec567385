"""The router's gRPC door over the compositions of a gateway (request speed). Must not know: how the router decides."""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.coe.decision import Decision, DecisionId, Question
from antiphon.core.composition import split_model_name
from antiphon.core.errors import InvalidInput, UnknownModel
from antiphon.gateway.auth import ApiKeys
from antiphon.gateway.coe_composition import Composition, holder_of, policy_named
from antiphon.rpc.v1 import router_pb2 as pb


class CoeGrpcDoor:
    """Implements ``rpc.router_service.RouterPort``; ``compositions`` by metadata.name."""

    def __init__(self, compositions: Mapping[str, Composition], keys: ApiKeys) -> None:
        self._compositions = compositions
        self._keys = keys

    async def route(self, request: pb.RouteRequest, authorization: str | None) -> pb.RouteDecision:
        """Decide.

        Raises:
            Unauthenticated: the key is not accepted.
            UnknownModel: there is no such composition.
            InvalidInput: no expert can be asked for this.
            Unavailable: none that could serve it is healthy.
        """
        self._keys.check(authorization)
        named = split_model_name(request.model)
        if named is None:
            raise InvalidInput("model must be coe/<name> or coe/<name>:<policy>", "model")
        name, policy = named
        if name not in self._compositions:
            raise UnknownModel(f"the model 'coe/{name}' does not exist", "model")
        restricted = request.restricted or bool(request.allowed_experts)
        question = Question(
            prompt=request.prompt,
            session=request.session[:256],
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
        composition = self._compositions[name]
        record = await composition.route(question)
        composition.served(question, record.decision.expert)
        return _decision(record.decision, record.decision_id, record.artifact_digest)

    async def explain(self, request: pb.ExplainRequest, authorization: str | None) -> pb.ExplainResponse:
        """The record of a decision, replayed when a policy is named.

        Raises:
            Unauthenticated: the key is not accepted.
            InvalidInput: there is no such record or policy.
        """
        self._keys.check(authorization)
        decision_id = DecisionId(request.decision_id)
        composition = holder_of(self._compositions.values(), decision_id)
        record = composition.router.explain(decision_id)
        response = pb.ExplainResponse(
            decision=_decision(record.decision, decision_id, record.artifact_digest),
            composition=composition.name,
            decided_s=record.decided_s,
            took_s=record.took_s,
            probabilities={} if record.judgement is None else dict(record.judgement.probabilities),
        )
        if request.policy:
            replayed = composition.router.replay(decision_id, policy_named(request.policy))
            response.replay.CopyFrom(_decision(replayed, decision_id, record.artifact_digest))
        return response

    async def feedback(self, request: pb.FeedbackRequest, authorization: str | None) -> pb.FeedbackResponse:
        """Note how good an answer was.

        Raises:
            Unauthenticated: the key is not accepted.
            InvalidInput: there is no such record, or the score is not 0..1.
        """
        self._keys.check(authorization)
        decision_id = DecisionId(request.decision_id)
        holder_of(self._compositions.values(), decision_id).router.feedback(decision_id, request.score)
        return pb.FeedbackResponse()

    async def list_experts(self, request: pb.ListExpertsRequest, authorization: str | None) -> pb.ListExpertsResponse:
        """Experts of every composition and their state.

        Raises:
            Unauthenticated: the key is not accepted.
        """
        self._keys.check(authorization)
        response = pb.ListExpertsResponse()
        for composition in self._compositions.values():
            view = composition.view()
            for expert in composition.document.spec.experts:
                state = view.of(expert.name)
                response.experts.add(
                    composition=composition.name,
                    name=expert.name,
                    external=expert.external is not None,
                    general=expert.name == composition.document.spec.general,
                    healthy=state.healthy,
                    resident=state.resident,
                    num_waiting=state.num_waiting,
                    expected_wait_s=state.expected_wait_s,
                    active_params_b=expert.active_params_b,
                    context_tokens=expert.context_tokens,
                    modalities=expert.modalities,
                    tools=expert.tools,
                )
        return response


def _decision(decision: Decision, decision_id: str, artifact: str) -> pb.RouteDecision:
    return pb.RouteDecision(
        decision_id=decision_id,
        expert=decision.expert,
        reason=decision.reason.value,
        detail=decision.detail,
        policy=decision.policy,
        runner_up=decision.runner_up if decision.runner_up is not None else "",
        alternatives=decision.alternatives,
        category=decision.category,
        confidence=decision.confidence,
        familiarity=decision.familiarity,
        slow_path=decision.slow,
        artifact=artifact,
        candidates=[
            pb.RouteCandidate(
                expert=c.expert,
                score=c.score,
                cost=c.cost,
                wait=c.wait,
                total=c.total,
                blocked_by="" if c.block is None else c.block.value,
            )
            for c in decision.candidates
        ],
    )
