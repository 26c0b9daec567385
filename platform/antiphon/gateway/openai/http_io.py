"""Bytes in and out of the HTTP door: request ids, bodies with limits, errors, answers that end with their client (request speed).

Must not know: OpenAI's bodies, or how requests are answered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from antiphon.gateway.generation.request import MAX_REQUEST_ID_CHARS
from antiphon.gateway.openai.answers import error_body
from antiphon.telemetry import log_context

_log = logging.getLogger(__name__)
_access = logging.getLogger("antiphon.access")  # one line a request, without what it asks or answers

REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-request-timeout-s"

# Also part of ids that other protocols carry, so only what needs no quoting anywhere.
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")


class NotFound(InvalidInput):
    """No such path."""

    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class MethodNotAllowed(InvalidInput):
    """The path has no such method."""

    code = "method_not_allowed"
    http_status = 405


def new_request_id() -> str:
    """An id for a request that brought none."""
    return secrets.token_hex(12)


def valid_request_id(text: str | None) -> bool:
    """Whether a client's request id can be taken over."""
    return text is not None and _REQUEST_ID.fullmatch(text) is not None


class RequestIds:
    """Middleware: every request has an id in its state, every answer has it in its header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "request_id" in scope.setdefault("state", {}):  # a door in front of this one has seen to it
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for key, value in scope["headers"] if key == REQUEST_ID_HEADER.encode()), None)
        request_id = given if given is not None and valid_request_id(given) else new_request_id()
        scope["state"]["request_id"] = request_id

        started_s = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        with log_context(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                client = scope.get("client")
                _access.info(
                    "%s %s",
                    scope["method"],
                    scope["path"][:200],
                    extra={
                        "status": status or 499,  # nothing was sent: the client left
                        "duration_s": round(time.perf_counter() - started_s, 4),
                        "client": client[0] if client else "",
                    },
                )


def error_response(error: Exception) -> Response:
    """Any error in OpenAI's shape; what isn't of our tree is logged and shown as an internal error."""
    if isinstance(error, ClientDisconnect):
        error = Cancelled("the client left")
    if not isinstance(error, AntiphonError):
        _log.error("a request failed", exc_info=error)
        error = InternalError(f"{type(error).__name__}: {error}")
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def deadline_of(request: Request) -> float | None:
    """Seconds the client gives its request, from its header; None = it doesn't say.

    Raises:
        InvalidInput: the header isn't a positive number.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidInput(f"{TIMEOUT_HEADER} must be a positive number of seconds", TIMEOUT_HEADER)
    return seconds


class ClientBound(Response):
    """An answer whose work ends when its client leaves.

    Args:
        produce: sends the whole answer; it is cancelled when the client disconnects.
    """

    def __init__(self, produce: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the work beside a watch on the connection."""
        has_begun = False

        async def begin(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        work = asyncio.ensure_future(self._produce(scope, receive, begin))
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            results = await asyncio.gather(work, watch, return_exceptions=True)
        if isinstance(results[0], TimeoutError) and not has_begun:  # late, on a machine that does too much else
            await error_response(DeadlineExceeded("the request's deadline has passed"))(scope, receive, send)
            return
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]


async def _disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
