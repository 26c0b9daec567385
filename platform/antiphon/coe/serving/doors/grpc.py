"""The router's gRPC door over the compositions of a process (request speed). Must not know: how the router decides."""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.coe.routing.decision import DecisionId
from antiphon.coe.serving.composition import Composition, explained
from antiphon.coe.serving.wire import message_of, question_of
from antiphon.core.document.composition import policy_named, split_model_name
from antiphon.core.errors import InvalidInput, UnknownModel
from antiphon.gateway.access.keys import ApiKeys
from antiphon.rpc.v1 import router_pb2 as pb


class CoeGrpcDoor:
    """Implements ``rpc.router.service.RouterPort``; ``compositions`` by metadata.name."""

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
        return message_of(await self._compositions[name].route(question_of(request, policy), request.avoided_experts))

    async def explain(self, request: pb.ExplainRequest, authorization: str | None) -> pb.ExplainResponse:
        """The record of a decision, replayed when a policy is named.

        Raises:
            Unauthenticated: the key is not accepted.
            InvalidInput: there is no such record or policy.
        """
        self._keys.check(authorization)
        policy = policy_named(request.policy) if request.policy else None
        composition, record, replayed = await explained(self._compositions.values(), DecisionId(request.decision_id), policy)
        response = pb.ExplainResponse(
            decision=message_of(record),
            composition=composition.name,
            decided_s=record.decided_s,
            took_s=record.took_s,
            probabilities={} if record.judgement is None else dict(record.judgement.probabilities),
        )
        if replayed is not None:
            response.replay.CopyFrom(message_of(record, replayed))
        return response

    async def feedback(self, request: pb.FeedbackRequest, authorization: str | None) -> pb.FeedbackResponse:
        """Note how good an answer was.

        Raises:
            Unauthenticated: the key is not accepted.
            InvalidInput: there is no such record, or the score is not 0..1.
            AlreadyRated: the decision has another score.
        """
        self._keys.check(authorization)
        decision_id = DecisionId(request.decision_id)
        composition, _, _ = await explained(self._compositions.values(), decision_id, None)
        await composition.feedback(decision_id, request.score, request.expert or None)
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
