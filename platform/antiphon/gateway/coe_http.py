"""The composition-of-experts door in front of the OpenAI door (request speed).

    POST /v1/chat/completions, /v1/completions  with "model": "coe/<name>" or "coe/<name>:<policy>": route, let the expert answer
    GET  /v1/models             compositions are listed too
    POST /v1/route              decide only             GET  /v1/experts               experts and their state
    GET  /v1/decisions/{id}     explain, ?policy= replays        POST /v1/feedback     how good an answer was

Everything else passes through. An expert that refuses, fails or stays silent before its first byte is left for the next one; what a
client has seen is never taken back. Must not know: how the router decides.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.coe.decision import DecisionId, Question
from antiphon.coe.record_json import record_json
from antiphon.coe.router import Record
from antiphon.core.composition import ExternalEndpoint, Policy, split_model_name
from antiphon.core.errors import InvalidInput, Unavailable, UnknownModel
from antiphon.gateway.auth import ApiKeys
from antiphon.gateway.coe_composition import Composition, holder_of, policy_named
from antiphon.gateway.coe_question import question_of
from antiphon.gateway.http_io import RequestTooLarge, error_response

_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
_TRY_NEXT = frozenset({404, 429, 500, 502, 503, 504})
_HEADER_SAFE = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"


class CoeDoor:
    """ASGI application that serves compositions and hands the rest to ``inner``. ``close`` is idempotent."""

    def __init__(self, inner: ASGIApp, compositions: Mapping[str, Composition], *, keys: ApiKeys, max_request_bytes: int) -> None:
        """``compositions`` by metadata.name."""
        self._inner = inner
        self._compositions = compositions
        self._keys = keys
        self._max_bytes = max_request_bytes
        self._client = httpx.AsyncClient(follow_redirects=False, limits=httpx.Limits(max_connections=None))

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
        if handler is None:
            await self._inner(scope, receive, send)
            return
        try:
            self._keys.check(request.headers.get("authorization"))
            response: Response = JSONResponse(await handler(request))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            response = error_response(error)
        await response(scope, receive, send)

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            raw = await _read(request, self._max_bytes)
        except Exception as error:  # noqa: BLE001 - the door, as above
            await error_response(error)(scope, receive, send)
            return
        body = _object(raw)
        named = split_model_name(body["model"]) if body is not None and isinstance(body.get("model"), str) else None
        if body is None or named is None:
            await self._inner(scope, _replayed(raw, receive), send)
            return
        try:
            self._keys.check(request.headers.get("authorization"))
            composition, policy = self._composition(*named)
            question = question_of(body, dict(request.headers), composition.document.spec, policy)
            record = await composition.route(question)
        except Exception as error:  # noqa: BLE001 - the door, as above
            await error_response(error)(scope, receive, send)
            return
        await self._answer(composition, question, record, body, scope, receive, send)

    async def _answer(
        self,
        composition: Composition,
        question: Question,
        record: Record,
        body: dict[str, Any],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Try the decision's experts in order until one has begun to answer."""
        explicit = question.expert is not None
        experts = (record.decision.expert, *(() if explicit else record.decision.alternatives))
        failures: list[str] = []
        for index, expert in enumerate(experts):
            if index and composition.breakers[expert].is_open:
                continue
            last = index == len(experts) - 1
            attempt = _Attempt(send, _headers(record, expert, failures), take_any=last)
            await self._try(composition, expert, body, attempt, scope, receive)
            if attempt.started:
                if not attempt.failed:
                    composition.served(question, expert)
                return
            failures.append(f"{expert}: {attempt.why}")
        error = Unavailable("no expert could answer (" + "; ".join(failures) + ")")
        await error_response(error)(scope, receive, send)

    async def _try(
        self,
        composition: Composition,
        expert: str,
        body: dict[str, Any],
        attempt: _Attempt,
        scope: Scope,
        receive: Receive,
    ) -> None:
        breaker, limits = composition.breakers[expert], composition.document.spec.limits
        endpoint = composition.external(expert)
        if endpoint is not None and composition.num_running[expert] >= limits.max_concurrent_per_expert:
            attempt.why = "busy"
            return
        breaker.begin()
        composition.num_running[expert] += 1
        patience_s = limits.first_token_timeout_s if body.get("stream") or endpoint is not None else None
        try:
            if endpoint is None:
                raw = json.dumps({**body, "model": composition.model_of(expert)}).encode()
                work = self._inner(_sized(scope, len(raw)), _replayed(raw, receive), attempt.send)
            else:
                work = self._forward(endpoint, body, attempt, scope["path"], limits.connect_timeout_s, limits.idle_timeout_s)
            await _until_started(work, attempt, patience_s)
        except TimeoutError:
            attempt.fail("sent nothing in time")
        except httpx.HTTPError as error:
            attempt.fail(type(error).__name__)
            if attempt.started:
                raise Unavailable(f"expert {expert} broke off its answer") from error
        finally:
            composition.num_running[expert] -= 1
            if attempt.failed:
                breaker.failed()
            elif attempt.started:
                breaker.succeeded()

    async def _forward(
        self,
        endpoint: ExternalEndpoint,
        body: dict[str, Any],
        attempt: _Attempt,
        path: str,
        connect_s: float,
        idle_s: float,
    ) -> None:
        """Stream an external endpoint's answer through."""
        headers = {}
        if endpoint.api_key_env is not None and (key := os.environ.get(endpoint.api_key_env)):
            headers["authorization"] = f"Bearer {key}"
        timeout = httpx.Timeout(idle_s, connect=connect_s)
        url = endpoint.url + path.removeprefix("/v1")
        sent = {**body, "model": endpoint.model}
        async with self._client.stream("POST", url, json=sent, headers=headers, timeout=timeout) as answer:
            content_type = answer.headers.get("content-type", "application/json").encode("latin-1")
            await attempt.send(
                {"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", content_type)]}
            )
            if not attempt.started:
                return
            async for chunk in answer.aiter_bytes():
                await attempt.send({"type": "http.response.body", "body": chunk, "more_body": True})
            await attempt.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._inner(scope, receive, keep)
        start = messages[0]
        listed = _object(b"".join(m.get("body", b"") for m in messages[1:]))
        if start["status"] != 200 or listed is None:
            for message in messages:
                await send(message)
            return
        cards = [{"id": c.name, "object": "model", "created": 0, "owned_by": "antiphon"} for c in self._compositions.values()]
        await JSONResponse({**listed, "data": [*listed["data"], *cards]})(scope, receive, send)

    async def _route(self, request: Request) -> dict[str, Any]:
        body = _object(await _read(request, self._max_bytes))
        if body is None:
            raise InvalidInput("the body must be a JSON object")
        named = split_model_name(body["model"]) if isinstance(body.get("model"), str) else None
        if named is None:
            raise InvalidInput("model must be coe/<name> or coe/<name>:<policy>", "model")
        composition, policy = self._composition(*named)
        record = await composition.route(question_of(body, dict(request.headers), composition.document.spec, policy))
        return record_json(record)

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
                        "num_waiting": state.num_waiting,
                        "expected_wait_s": state.expected_wait_s,
                    }
                )
        return {"object": "list", "data": found}

    async def _explain(self, request: Request) -> dict[str, Any]:
        decision_id = DecisionId(request.url.path.removeprefix("/v1/decisions/"))
        composition = holder_of(self._compositions.values(), decision_id)
        record = composition.router.explain(decision_id)
        result = {"composition": composition.name, "decided_s": record.decided_s, **record_json(record)}
        if (wanted := request.query_params.get("policy")) is not None:
            replayed = composition.router.replay(decision_id, policy_named(wanted))
            result["replay"] = {"policy": wanted, "expert": replayed.expert, "reason": replayed.reason.value}
        return result

    async def _feedback(self, request: Request) -> dict[str, Any]:
        body = _object(await _read(request, self._max_bytes))
        if body is None or not isinstance(body.get("decision_id"), str):
            raise InvalidInput("decision_id must be the id of a decision", "decision_id")
        score = body.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InvalidInput("score must be a number between 0 and 1", "score")
        decision_id = DecisionId(body["decision_id"])
        holder_of(self._compositions.values(), decision_id).router.feedback(decision_id, float(score))
        return {"decision_id": decision_id, "score": float(score)}

    def _composition(self, name: str, policy: Policy | None) -> tuple[Composition, Policy | None]:
        if name not in self._compositions:
            raise UnknownModel(f"the model 'coe/{name}' does not exist", "model")
        return self._compositions[name], policy


class _Attempt:
    """One expert's try at a request: passes its answer on, or holds it back while another expert may do better."""

    def __init__(self, send: Send, headers: dict[str, str], *, take_any: bool) -> None:
        self._send = send
        self._headers = headers
        self._take_any = take_any
        self.started = False  # the client has seen the beginning
        self.failed = False
        self.why = ""
        self.begun = asyncio.Event()  # started, or known not to be

    async def send(self, message: Message) -> None:
        """The expert's side of ASGI."""
        if message["type"] == "http.response.start":
            status = message["status"]
            self.failed = status >= 500
            if status in _TRY_NEXT and not self._take_any:
                self.why = self.why or f"status {status}"
                self.begun.set()
                return
            MutableHeaders(scope=message).update(self._headers)
            self.started = True
            self.begun.set()
        if self.started:
            await self._send(message)

    def fail(self, why: str) -> None:
        """It could not be reached or was silent."""
        self.failed, self.why = True, why
        self.begun.set()


async def _until_started(work: Any, attempt: _Attempt, patience_s: float | None) -> None:
    """Run an attempt; give up when nothing was begun within ``patience_s``."""
    task = asyncio.ensure_future(work)
    begun = asyncio.ensure_future(attempt.begun.wait())
    try:
        await asyncio.wait({task, begun}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not attempt.begun.is_set() and not task.done():
            raise TimeoutError
        if attempt.started or not attempt.begun.is_set():
            await task
    finally:
        for pending in (task, begun):
            pending.cancel()
        await asyncio.gather(task, begun, return_exceptions=True)


def _headers(record: Record, expert: str, failures: list[str]) -> dict[str, str]:
    decision = record.decision
    reason = "fallback" if failures else decision.reason.value
    headers = {
        "x-antiphon-expert": expert,
        "x-antiphon-category": quote(decision.category, safe=_HEADER_SAFE),
        "x-antiphon-confidence": f"{decision.confidence:.4f}",
        "x-antiphon-reason": reason,
        "x-antiphon-decision-id": record.decision_id,
    }
    if failures:
        headers["x-antiphon-fallback"] = quote("; ".join(failures), safe=_HEADER_SAFE)
    return headers


def _sized(scope: Scope, num_bytes: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(num_bytes).encode())]}


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise RequestTooLarge(f"the body is larger than {max_bytes} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _replayed(raw: bytes, receive: Receive) -> Receive:
    """A receive that gives the body again, then whatever the client does next."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}
        return await receive()

    return again
