"""The OpenAI-compatible HTTP door (request speed).

    /v1/models  /v1/models/{id}  /v1/chat/completions  /v1/completions  /health  /ready  /metrics  /status

Whatever goes wrong is answered in OpenAI's error shape. The header x-request-id is taken over and returned,
x-request-timeout-s is the request's deadline, traceparent its trace. A client that leaves cancels its request at the engine.

Must not know: how requests are answered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from antiphon import __version__
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.gateway.access.early import EarlyRefusal
from antiphon.gateway.anthropic.errors import error_at
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import ChoiceDelta, Completed, Event, Started
from antiphon.gateway.http.event_stream import DONE, LAST_EVENT_HEADER, EventStream, one_line
from antiphon.gateway.http.manners import Manners
from antiphon.gateway.openai.answers import Answer, model_card
from antiphon.gateway.openai.http_io import (
    ClientBound,
    NotFound,
    RequestIds,
    deadline_of,
    error_response,
)
from antiphon.gateway.openai.parsing import parse_tolerant, warning_header
from antiphon.gateway.openai.schema import ChatBody, CompletionBody
from antiphon.gateway.openai.serving import SEND_GRACE_S, SSE_HEADERS
from antiphon.gateway.status import Status
from antiphon.telemetry import CONTENT_TYPE


def make_app(gateway: Gateway) -> FastAPI:
    """The application over a gateway."""
    app = FastAPI(title="Antiphon", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Manners, routes=app.routes, refused=gateway.refused)
    app.add_middleware(EarlyRefusal, gateway=gateway)
    app.add_middleware(RequestIds)

    async def routing_error(request: Request, error: Exception) -> Response:
        return refused_with(request, _routing_error(request, error))

    async def any_error(request: Request, error: Exception) -> Response:
        return refused_with(request, error)

    def refused_with(request: Request, error: Exception) -> Response:
        gateway.refused(error)
        return error_at(request.url.path, error)

    app.add_exception_handler(HTTPException, routing_error)
    app.add_exception_handler(Exception, any_error)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _complete(gateway, request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete(gateway, request, CompletionBody)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return _guarded(gateway, request, lambda: {"object": "list", "data": [_card(gateway, name) for name in gateway.models]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        return _guarded(gateway, request, lambda: _card(gateway, name))

    @app.get("/status")
    async def status(request: Request) -> Response:
        asked = request.query_params.get("deployment", "")
        return _guarded(gateway, request, lambda: status_body(gateway.status(asked)), admin=True)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        why = gateway.why_not_ready()
        body = {"status": "ready" if why is None else why, "ready_workers": gateway.num_ready_workers}
        if gateway.config.document_revision:
            body |= {"revision": gateway.config.document_revision, "revisions": gateway.revisions()}
        return JSONResponse(body, status_code=200 if why is None else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if gateway.config.metrics_access == "admin":
            try:
                gateway.keys.check(request.headers.get("authorization"), admin=True)
            except AntiphonError as error:
                return error_response(error)
        text = await asyncio.to_thread(gateway.telemetry.prometheus_text)
        return Response(text, media_type=CONTENT_TYPE)

    return app


def _guarded(gateway: Gateway, request: Request, make: Any, *, admin: bool = False) -> Response:
    try:
        gateway.keys.check(request.headers.get("authorization"), admin=admin)
        return JSONResponse(make())
    except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
        gateway.refused(error)
        return error_response(error)


def _card(gateway: Gateway, name: str) -> dict[str, Any]:
    return model_card(name, created=gateway.created, max_model_len=gateway.max_model_len(name), task=gateway.task(name))


def status_body(status: Status) -> dict[str, Any]:
    """A status as JSON; workers as they stand in the directory, with lease and session."""
    body = dataclasses.asdict(status)
    body["pools"] = [{**dataclasses.asdict(pool), "role": pool.role.value} for pool in status.pools]
    body["workers"] = [
        {
            **json.loads(worker.info.to_json()),
            "lease_remaining_s": round(worker.lease_remaining_s, 3),
            "connected": worker.connected,
            "num_requests": worker.num_requests,
        }
        for worker in status.workers
    ]
    return body


async def _complete(gateway: Gateway, request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    given: dict[str, Any] = {}
    try:
        tenant = gateway.admit(request.headers.get("authorization"))
        given = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
        body, ignored = await gateway.bodies.work(request, parse_tolerant, kind, given, gateway.config.unknown_fields)
        generation = await gateway.bodies.work(
            request,
            body.request,
            request_id=request.state.request_id,
            deadline_s=deadline_of(request),
            traceparent=request.headers.get("traceparent"),
        )
        generation = dataclasses.replace(
            gateway.for_tenant(generation, tenant), placement_timeout_s=getattr(request.state, "placement_timeout_s", None)
        )
        stream = EventStream(generation, request.headers.get(LAST_EVENT_HEADER))
    except Exception as error:  # noqa: BLE001 - the door, as above
        gateway.refused(error, given.get("model"))
        return error_response(error)
    include_usage = bool(body.stream_options is not None and body.stream_options.include_usage)
    answer = Answer(
        chat=isinstance(body, ChatBody),
        num_logprobs=generation.sampling.num_logprobs,
        include_usage=include_usage,
        echo=isinstance(body, CompletionBody) and bool(body.echo),
        n=generation.n,
        with_thoughts=not isinstance(body, ChatBody) or body.shows_thoughts,
        with_functions=isinstance(body, ChatBody) and body.uses_functions,
        num_prompt_logprobs=body.prompt_logprobs,
    )
    headers = warning_header(ignored)
    produce = _stream if generation.stream else _whole
    limit_s = gateway.config.max_deadline_s if generation.deadline_s is None else generation.deadline_s

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(limit_s + SEND_GRACE_S):
            await produce(gateway, stream, answer, headers, scope, receive, send)

    return ClientBound(bounded)


async def _whole(
    gateway: Gateway,
    stream: EventStream,
    answer: Answer,
    headers: Mapping[str, str],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    try:
        async with aclosing(gateway.generate(stream.generation)) as events:
            async for event in events:
                match event:
                    case Started():
                        answer.start(event)
                    case ChoiceDelta():
                        answer.add(event)
                    case Completed():
                        response: Response = JSONResponse(answer.body(event.usage), headers=headers)
    except Exception as error:  # noqa: BLE001 - the door, as above
        response = error_response(error)
    await response(scope, receive, send)


async def _stream(
    gateway: Gateway,
    stream: EventStream,
    answer: Answer,
    headers: Mapping[str, str],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Server-sent events. Errors before the first token have a status of their own, later ones are an event."""
    started = False
    try:
        async with aclosing(stream.events(gateway.generate(stream.generation))) as events:
            async for event in events:
                body = stream.frame(event, _chunks(answer, event), named=False)
                if not started and (not stream.is_replay or isinstance(event, Completed)):
                    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
                    await send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *raw]})
                    started = True
                if body or isinstance(event, Completed):
                    await send({"type": "http.response.body", "body": body, "more_body": not isinstance(event, Completed)})
    except OSError:
        raise  # the client is gone
    except Exception as error:  # noqa: BLE001 - the door, as above
        response = error_response(error)
        if not started:
            await response(scope, receive, send)
            return
        data = one_line(bytes(response.body).decode()).encode()
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": False})


def _chunks(answer: Answer, event: Event) -> list[dict[str, Any] | str]:
    match event:
        case Started():
            answer.start(event)
            return []
        case ChoiceDelta():
            return [*answer.chunks(event)]
        case Completed():
            usage = answer.usage_chunk(event.usage)
            return [DONE] if usage is None else [usage, DONE]


def _routing_error(request: Request, error: Exception) -> AntiphonError:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return NotFound(f"there is no {request.method} {request.url.path}")
    return InvalidInput(str(error.detail))
