"""POST /v1/embeddings, /v1/rerank and /v1/score (request speed). Must not know: how vectors are made."""

from __future__ import annotations

import base64
import struct
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from antiphon.gateway.access.keys import cache_salt
from antiphon.gateway.embeddings.request import EmbeddingRequest, ScoreRequest, VectorCall
from antiphon.gateway.embeddings.schema import EmbeddingsBody, RerankBody, ScoreBody
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.openai.http_io import ClientBound, deadline_of, error_response
from antiphon.gateway.openai.parsing import parse_tolerant, warning_header

_Body = TypeVar("_Body", EmbeddingsBody, RerankBody, ScoreBody)
Json = dict[str, Any]


def add_embedding_routes(app: FastAPI, gateway: Gateway) -> None:
    """Put the routes into the application."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await _answered(gateway, request, EmbeddingsBody, _embeddings)

    @app.post("/v1/rerank")
    @app.post("/rerank")
    @app.post("/v2/rerank")
    async def rerank(request: Request) -> Response:
        return await _answered(gateway, request, RerankBody, _rerank)

    @app.post("/v1/score")
    @app.post("/score")
    async def score(request: Request) -> Response:
        return await _answered(gateway, request, ScoreBody, _score)


async def _answered(
    gateway: Gateway, request: Request, kind: type[_Body], answer: Callable[[Gateway, _Body, VectorCall], Awaitable[Json]]
) -> Response:
    given: Json = {}
    try:
        tenant = gateway.admit(request.headers.get("authorization"))
        given = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
        body, ignored = await gateway.bodies.work(request, parse_tolerant, kind, given, gateway.config.unknown_fields)
        salt = "" if body.model in gateway.config.shared_cache_models else cache_salt(tenant, "")
        call = VectorCall(
            request_id=request.state.request_id,
            model=body.model,
            deadline_s=deadline_of(request),
            priority=body.priority or 0,
            cache_salt=salt,
            tenant=tenant,
            traceparent=request.headers.get("traceparent"),
            truncate_tokens=body.truncate_prompt_tokens,
        )
    except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
        gateway.refused(error, given.get("model"))
        return error_response(error)

    async def produce(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await answer(gateway, body, call), headers=warning_header(ignored))
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error, body.model)
            response = error_response(error)
        await response(scope, receive, send)

    return ClientBound(produce)


async def _embeddings(gateway: Gateway, body: EmbeddingsBody, call: VectorCall) -> Json:
    request = EmbeddingRequest(
        call=call,
        inputs=body.input,
        dimensions=body.dimensions,
        add_special_tokens=body.add_special_tokens is not False,
    )
    made = await gateway.vectors().embed(request)
    shown = _base64 if body.encoding_format == "base64" else list
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(made.vectors)],
        "model": body.model,
        "usage": _usage(made.num_prompt_tokens),
    }


async def _rerank(gateway: Gateway, body: RerankBody, call: VectorCall) -> Json:
    documents = [document if isinstance(document, str) else document.text for document in body.documents]
    request = ScoreRequest(call=call, pairs=tuple((body.query, document) for document in documents), instruction=body.instruction)
    made = await gateway.vectors().score(request)
    order = sorted(range(len(documents)), key=lambda index: (-made.values[index], index))
    results: list[Json] = [{"index": index, "relevance_score": made.values[index]} for index in order]
    if body.return_documents is not False:
        results = [{**result, "document": {"text": documents[result["index"]]}} for result in results]
    return {
        "id": f"rerank-{call.request_id}",
        "model": body.model,
        "results": results[: body.top_n or None],
        "usage": _usage(made.num_prompt_tokens),
    }


async def _score(gateway: Gateway, body: ScoreBody, call: VectorCall) -> Json:
    request = ScoreRequest(call=call, pairs=body.pairs(), instruction=body.instruction, fields=("text_1", "text_2"))
    made = await gateway.vectors().score(request)
    return {
        "id": f"score-{call.request_id}",
        "object": "list",
        "created": gateway.created,
        "model": body.model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(made.values)],
        "usage": _usage(made.num_prompt_tokens),
    }


def _usage(num_tokens: int) -> Json:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _base64(vector: tuple[float, ...]) -> str:
    """Little-endian fp32, as OpenAI's."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
