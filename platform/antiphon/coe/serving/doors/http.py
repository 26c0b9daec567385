"""The composition-of-experts door in front of the OpenAI door (request speed).

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/messages/count_tokens
                                with "model": "coe/<name>" or "coe/<name>:<policy>": route, let the expert answer
    GET  /v1/models             compositions are listed too     GET  /v1/models/coe/<name>     one of them
    POST /v1/route              decide only                     GET  /v1/experts               experts and their state
    GET  /v1/decisions/{id}     explain, ?policy= replays       POST /v1/feedback              how good an answer was

Everything else passes through. An expert that refuses, fails or stays silent before its first byte is left for the next one; what a
client has seen is never taken back. Must not know: how the router decides.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.coe.routing.decision import DecisionId, Question
from antiphon.coe.routing.record_json import record_json
from antiphon.coe.routing.router import Record
from antiphon.coe.serving.combining import decline_early, experts_to_combine
from antiphon.coe.serving.composition import Composition, explained
from antiphon.coe.serving.doors.attempt import (
    RESPONSES,
    Attempt,
    Client,
    answer_headers,
    begun_by,
    body_scope,
    forward,
    json_object,
    quoted,
    refuse_kept,
    replayed,
    until_started,
    while_connected,
)
from antiphon.coe.serving.doors.combined import answer_combined
from antiphon.coe.serving.doors.connections import open_client
from antiphon.coe.serving.doors.held import asked_json
from antiphon.coe.serving.doors.question import question_of
from antiphon.coe.serving.fallback import Fallback, Turn
from antiphon.core.document.composition import Policy, policy_named, split_model_name
from antiphon.core.errors import DeadlineExceeded, InvalidInput, Overloaded, Unavailable, UnknownModel
from antiphon.gateway.access.admission import Admission
from antiphon.gateway.access.keys import ApiKeys
from antiphon.gateway.anthropic.errors import anthropic_error
from antiphon.gateway.anthropic.routes import authorization_of
from antiphon.gateway.http.bodies import LARGE_BYTES, Bodies
from antiphon.gateway.http.event_stream import LAST_EVENT_HEADER
from antiphon.gateway.openai.http_io import deadline_of, error_response

_COMBINED = ("/v1/chat/completions", "/v1/completions")  # several experts may answer together
_ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
_COMPLETIONS = (*_COMBINED, RESPONSES, *_ANTHROPIC)
_MODEL = "/v1/models/"


class CoeDoor:
    """ASGI application that serves compositions and hands the rest to ``inner``. ``close`` is idempotent.

    Args:
        inner: the door behind this one.
        compositions: by metadata.name.
        keys: who may ask.
        max_request_bytes: of a body.
        bodies: what bodies may cost together, with those of the door behind; None = a measure of this door's own.
        refused: counts what this door refuses by itself; the second is the model as the client sent it.
        limits: what tenants may ask, of the door behind; None = as much as they like.
    """

    def __init__(
        self,
        inner: ASGIApp,
        compositions: Mapping[str, Composition],
        *,
        keys: ApiKeys,
        max_request_bytes: int,
        bodies: Bodies | None = None,
        refused: Callable[[Exception, object], None] = lambda _error, _model: None,
        limits: Admission | None = None,
    ) -> None:
        self._limits = limits
        self._refused = refused
        self._bodies = Bodies() if bodies is None else bodies
        self._inner = inner
        self._compositions = compositions
        self._keys = keys
        self._max_bytes = max_request_bytes
        self._created = int(time.time())
        self._client = open_client()

    async def close(self) -> None:
        """Close connections to external experts."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        if method == "POST" and path in _COMPLETIONS:
            await self._complete(scope, receive, send)
            return
        if method == "GET" and path == "/v1/models":
            await self._models(scope, receive, send)
            return
        request = Request(scope, receive)
        handler = None
        if method == "POST" and path == "/v1/route":
            handler = self._route
        elif method == "GET" and path == "/v1/experts":
            handler = self._experts
        elif method == "POST" and path == "/v1/feedback":
            handler = self._feedback
        elif method == "GET" and path.startswith("/v1/decisions/"):
            handler = self._explain
        elif method == "GET" and path.startswith(f"{_MODEL}coe/"):
            handler = self._model
        if handler is None:
            await self._inner(scope, receive, send)
            return
        try:
            self._keys.check(request.headers.get("authorization"))
            response: Response = JSONResponse(await handler(request))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            response = self._error(scope, error)
        await response(scope, receive, send)

    def _error(self, scope: Scope, error: Exception, model: object = None) -> Response:
        """The refusal in the shape of the door that was asked; counted."""
        self._refused(error, model)
        return _refusal_of(scope)(error)

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            tenant = self._keys.check(authorization_of(request))  # before a byte of the body is read
            if self._limits is not None:
                self._limits.check_early(tenant)
            raw, body = await self._read(request)
        except Exception as error:  # noqa: BLE001 - the door, as above
            await self._error(scope, error)(scope, receive, send)
            return
        named = split_model_name(body["model"]) if body is not None and isinstance(body.get("model"), str) else None
        if body is None or named is None:
            await self._inner(scope, replayed(raw, receive), send)
            return
        try:
            composition, policy = self._composition(*named)
            if any(composition.external(expert.name) is not None for expert in composition.document.spec.experts):
                refuse_kept(scope["path"], body)
            deadline_s = deadline_of(request)
            last_event_id = request.headers.get(LAST_EVENT_HEADER)
            if last_event_id is not None:
                expert = begun_by(composition, last_event_id, tenant=tenant, request_id=request.state.request_id)
                await self._go_on(composition, expert, body, scope, receive, send)
                return
            question = question_of(body, dict(request.headers), composition.document.spec, policy, tenant=tenant)
            record = await composition.route(question)
            decline_early(composition.document.spec, record)
        except Exception as error:  # noqa: BLE001 - the door, as above
            await self._error(scope, error, body["model"])(scope, receive, send)
            return
        calls_tools = bool(body.get("tools") or body.get("functions"))
        num_choices = (body.get("n") if body.get("n") is not None else 1) if scope["path"] in _COMBINED else 0
        experts = experts_to_combine(
            composition.document.spec,
            composition.breakers,
            record,
            num_choices=num_choices if isinstance(num_choices, int) and isinstance(body.get("prompt"), str | None) else 0,
            calls_tools=calls_tools,
        )
        if experts:
            await answer_combined(self._try, composition, question, record, experts, body, deadline_s, scope, receive, send)
        else:
            await self._answer(composition, question, record, body, deadline_s, scope, receive, send)

    async def _answer(
        self,
        composition: Composition,
        question: Question,
        record: Record,
        body: dict[str, Any],
        deadline_s: float | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Try the decision's experts in order until one has begun to answer."""
        fallback = Fallback(composition, question, record)
        started = False
        client = Client(receive)
        try:
            async with asyncio.timeout(deadline_s):
                for turn in fallback.turns():
                    attempt = Attempt(send, answer_headers(record, turn.expert, fallback.failures), take_any=turn.last)
                    try:
                        await self._try(composition, turn, body, attempt, scope, client.receive, fallback)
                    finally:
                        started = attempt.started
                    if attempt.started:
                        if not attempt.failed:
                            await fallback.answered(turn)
                        return
                    if client.gone:
                        return
                    fallback.failed(turn, attempt.why)
        except TimeoutError:
            if started:
                raise  # the connection is broken off: the client has seen a part
            error = DeadlineExceeded("the request's deadline has passed")
            await self._error(scope, error, composition.name)(scope, receive, send)
            return
        await self._error(scope, fallback.nobody(), composition.name)(scope, receive, send)

    async def _go_on(
        self, composition: Composition, expert: str, body: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """The rest of an expert's answer: nobody else can give it."""
        attempt = Attempt(send, {"x-antiphon-expert": quoted(expert), "x-antiphon-reason": "resumed"}, take_any=True)
        raw = json.dumps({**body, "model": composition.model_of(expert)}).encode()
        await self._inner(body_scope(scope, len(raw), {}), replayed(raw, receive), attempt.send)

    async def _try(
        self,
        composition: Composition,
        turn: Turn,
        body: dict[str, Any],
        attempt: Attempt,
        scope: Scope,
        receive: Receive,
        fallback: Fallback,
    ) -> None:
        """One expert's try; what came of it stands in ``attempt``."""
        limits = composition.document.spec.limits
        start_timeout_s = limits.first_token_timeout_s if body.get("stream") or turn.endpoint is not None else None
        try:
            with fallback.asking(turn) as breaker:
                try:
                    await until_started(self._work(composition, turn, body, attempt, scope, receive), attempt, start_timeout_s)
                except TimeoutError:
                    attempt.fail("sent nothing in time")
                except httpx.HTTPError as error:
                    attempt.fail(type(error).__name__)
                    if attempt.started:
                        raise Unavailable(f"expert {turn.expert} broke off its answer") from error
                finally:
                    if attempt.failed:
                        breaker.failed()
                    elif attempt.started:
                        breaker.succeeded()
        except Overloaded:
            attempt.why = "busy"

    def _work(
        self, composition: Composition, turn: Turn, body: dict[str, Any], attempt: Attempt, scope: Scope, receive: Receive
    ) -> Awaitable[None]:
        if turn.endpoint is None:
            raw = json.dumps({**body, "model": composition.model_of(turn.expert)}).encode()
            timeout_s = turn.placement_timeout_s
            state = {} if timeout_s is None else {"placement_timeout_s": timeout_s}
            return self._inner(body_scope(scope, len(raw), state), replayed(raw, receive), attempt.send)
        limits = composition.document.spec.limits
        forwarding = forward(
            self._client,
            turn.endpoint,
            body,
            attempt,
            scope["path"],
            connect_s=limits.connect_timeout_s,
            idle_s=limits.idle_timeout_s,
        )
        return while_connected(forwarding, receive)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._inner(scope, receive, keep)
        start = messages[0]
        listed = json_object(b"".join(m.get("body", b"") for m in messages[1:]))
        if start["status"] != 200 or listed is None:
            for message in messages:
                await send(message)
            return
        cards = [self._card(composition) for composition in self._compositions.values()]
        await JSONResponse({**listed, "data": [*listed["data"], *cards]})(scope, receive, send)

    async def _model(self, request: Request) -> dict[str, Any]:
        named = split_model_name(request.url.path.removeprefix(_MODEL))
        assert named is not None  # the path begins with coe/
        return self._card(self._composition(*named)[0])

    def _card(self, composition: Composition) -> dict[str, Any]:
        lengths = [expert.context_tokens for expert in composition.document.spec.experts if expert.context_tokens is not None]
        return {
            "id": composition.name,
            "object": "model",
            "created": self._created,
            "owned_by": "antiphon",
            "max_model_len": max(lengths, default=None),
            "experts": [expert.name for expert in composition.document.spec.experts],
        }

    async def _read(self, request: Request) -> tuple[bytes, dict[str, Any] | None]:
        """A body, and the object that it is; a large one is parsed off the event loop, few at once."""
        raw = await self._bodies.read(request, self._max_bytes)
        if len(raw) <= LARGE_BYTES:
            return raw, json_object(raw)
        async with self._bodies.turn(len(raw)):
            return raw, await asyncio.to_thread(json_object, raw)

    async def _route(self, request: Request) -> dict[str, Any]:
        _, body = await self._read(request)
        if body is None:
            raise InvalidInput("the body must be a JSON object")
        named = split_model_name(body["model"]) if isinstance(body.get("model"), str) else None
        if named is None:
            raise InvalidInput("model must be coe/<name> or coe/<name>:<policy>", "model")
        composition, policy = self._composition(*named)
        tenant = self._keys.check(request.headers.get("authorization"))
        question = question_of(body, dict(request.headers), composition.document.spec, policy, tenant=tenant)
        async with nullcontext() if self._limits is None else self._limits.unasked(tenant):
            return record_json(await composition.route(question))

    async def _experts(self, request: Request) -> dict[str, Any]:
        found = []
        for composition in self._compositions.values():
            view = composition.view()
            for expert in composition.document.spec.experts:
                state = view.of(expert.name)
                found.append(
                    {
                        "composition": composition.name,
                        "name": expert.name,
                        "external": expert.external is not None,
                        "general": expert.name == composition.document.spec.general,
                        "active_params_b": expert.active_params_b,
                        "context_tokens": expert.context_tokens,
                        "modalities": list(expert.modalities),
                        "tools": expert.tools,
                        "healthy": state.healthy,
                        "resident": state.resident,
                        "load_s": round(state.load_s, 3),
                        "num_waiting": state.num_waiting,
                        "expected_wait_s": state.expected_wait_s,
                    }
                )
        return {"object": "list", "data": found}

    async def _explain(self, request: Request) -> dict[str, Any]:
        decision_id = DecisionId(request.url.path.removeprefix("/v1/decisions/"))
        wanted = request.query_params.get("policy")
        policy = None if wanted is None else policy_named(wanted)
        composition, record, replay = await explained(self._compositions.values(), decision_id, policy)
        result = {"composition": composition.name, "decided_s": record.decided_s, **record_json(record)}
        if asked := composition.asked(decision_id):
            result["asked"] = asked_json(asked)
        if replay is not None:
            result["replay"] = {"policy": wanted, "expert": replay.expert, "reason": replay.reason.value}
        return result

    async def _feedback(self, request: Request) -> dict[str, Any]:
        _, body = await self._read(request)
        if body is None or not isinstance(body.get("decision_id"), str):
            raise InvalidInput("decision_id must be the id of a decision", "decision_id")
        score = body.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InvalidInput("score must be a number between 0 and 1", "score")
        decision_id = DecisionId(body["decision_id"])
        composition, _, _ = await explained(self._compositions.values(), decision_id, None)
        await composition.feedback(decision_id, float(score))
        return {"decision_id": decision_id, "score": float(score)}

    def _composition(self, name: str, policy: Policy | None) -> tuple[Composition, Policy | None]:
        if name not in self._compositions:
            raise UnknownModel(f"the model 'coe/{name}' does not exist", "model")
        return self._compositions[name], policy


def _refusal_of(scope: Scope) -> Callable[[Exception], Response]:
    """Errors as the clients of a route know them."""
    return anthropic_error if scope["path"] in _ANTHROPIC else error_response
