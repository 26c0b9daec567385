"""One expert's try at an HTTP request: passed on, or held back while another expert may do better (request speed).

Must not know: which expert comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any
from urllib.parse import quote

import httpx
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from antiphon.coe.routing.router import Record
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.doors.expert_key import key_headers
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.http.bodies import check_structure
from antiphon.gateway.http.event_stream import LAST_EVENT_HEADER, is_of

RESPONSES = "/v1/responses"
TRY_NEXT = frozenset({404, 429, 500, 502, 503, 504})
_MAX_ID_CHARS = 120  # a number is put behind
_HEADER_SAFE = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"


class Attempt:
    """What one expert sends. ``take_any``: nobody comes after it, so that its refusal is the answer, too."""

    def __init__(self, send: Send, headers: Mapping[str, str], *, take_any: bool) -> None:
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
            if status in TRY_NEXT and not self._take_any:
                self.why = self.why or f"status {status}"
                self.begun.set()
                return
            MutableHeaders(scope=message).update(dict(self._headers))
            self.started = True
            self.begun.set()
        if self.started:
            await self._send(message)

    def fail(self, why: str) -> None:
        """It could not be reached or was silent."""
        self.failed, self.why = True, why
        self.begun.set()


async def until_started(work: Awaitable[None], attempt: Attempt, start_timeout_s: float | None) -> None:
    """Run an attempt; give up when nothing was begun within ``start_timeout_s`` seconds.

    Raises:
        TimeoutError: it was silent for so long.
    """
    task = asyncio.ensure_future(work)
    begun = asyncio.ensure_future(attempt.begun.wait())
    try:
        await asyncio.wait({task, begun}, timeout=start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not attempt.begun.is_set() and not task.done():
            raise TimeoutError
        if attempt.started or not attempt.begun.is_set():
            await task
    finally:
        for pending in (task, begun):
            pending.cancel()
        await asyncio.gather(task, begun, return_exceptions=True)


class Client:
    """The client's side of a request whose body has been read; several attempts may listen in turn."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def receive(self) -> Message:
        """What the client does next: as long as it stays, nothing."""
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run ``work`` until it ends or the client has left."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def begun_by(composition: Composition, last_event_id: str, *, tenant: str, request_id: str) -> str:
    """The expert whose stream an event was of: its id proves it, so that nothing need be noted and any gateway can tell.

    Raises:
        InvalidInput: no expert that is served here gave it for this request and key.
    """
    for expert in composition.document.spec.experts:
        if composition.external(expert.name) is None and is_of(
            last_event_id, tenant=tenant, request_id=request_id, model=composition.model_of(expert.name)
        ):
            return expert.name
    raise InvalidInput(
        "no expert that is served here had begun this stream for this key and x-request-id; answers of other servers' experts, "
        "and those that were taken from several, can't be gone on with: ask anew",
        LAST_EVENT_HEADER,
    )


def refuse_kept(path: str, body: Mapping[str, Any]) -> None:
    """Refuse what would keep or go on with an answer at another server: there everybody who asks here has one key.

    Raises:
        InvalidInput: with the field.
    """
    if path != RESPONSES:
        return
    field = "previous_response_id" if body.get("previous_response_id") is not None else "store"
    if body.get(field) not in (None, False):
        raise InvalidInput("answers of a composition with experts of other servers are not kept: send the whole input", field)


async def forward(
    client: httpx.AsyncClient,
    endpoint: ExternalEndpoint,
    body: Mapping[str, Any],
    attempt: Attempt,
    path: str,
    *,
    connect_s: float,
    idle_s: float,
) -> None:
    """Stream an external endpoint's answer through; it keeps none that could be gone on with, see ``refuse_kept``.

    Raises:
        httpx.HTTPError: it can't be reached, or broke off.
    """
    timeout = httpx.Timeout(idle_s, connect=connect_s)
    url = endpoint.url + path.removeprefix("/v1")
    sent = {**body, "model": endpoint.model}
    if path == RESPONSES:
        sent["store"] = False
    async with client.stream("POST", url, json=sent, headers=key_headers(endpoint), timeout=timeout) as answer:
        content_type = answer.headers.get("content-type", "application/json").encode("latin-1")
        await attempt.send(
            {"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", content_type)]}
        )
        if not attempt.started:
            return
        async for chunk in answer.aiter_bytes():
            await attempt.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await attempt.send({"type": "http.response.body", "body": b"", "more_body": False})


def answer_headers(record: Record, expert: str, failures: list[str]) -> dict[str, str]:
    """Who answers and why, as headers or gRPC metadata."""
    decision = record.decision
    reason = "fallback" if failures else decision.reason.value
    headers = {
        "x-antiphon-expert": quote(expert, safe=_HEADER_SAFE),
        "x-antiphon-category": quote(decision.category, safe=_HEADER_SAFE),
        "x-antiphon-confidence": f"{decision.confidence:.4f}",
        "x-antiphon-reason": reason,
        "x-antiphon-decision-id": record.decision_id,
    }
    if failures:
        headers["x-antiphon-fallback"] = quote("; ".join(failures), safe=_HEADER_SAFE)
    elif reason == "fallback":
        headers["x-antiphon-fallback"] = quote(decision.detail, safe=_HEADER_SAFE)
    return headers


def body_scope(scope: Scope, num_bytes: int, state: Mapping[str, Any]) -> Scope:
    """The scope of another body for the same request; ``state`` is added to the request's."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    headers.append((b"content-length", str(num_bytes).encode()))
    return {**scope, "headers": headers, "state": {**scope.get("state", {}), **state}}


def scope_of_part(scope: Scope, number: int) -> Scope:
    """The scope of one of several requests that a request becomes, each with an id of its own."""
    state = scope.get("state", {})
    whole = state.get("request_id")
    part = {} if whole is None else {"request_id": f"{whole[:_MAX_ID_CHARS]}.{number}"}
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return {**scope, "headers": headers, "state": {**state, **part}}


def quoted(text: str) -> str:
    """As a header can carry it."""
    return quote(text, safe=_HEADER_SAFE)


def replayed(raw: bytes, receive: Receive) -> Receive:
    """A receive that gives the body again, then whatever the client does next."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}
        return await receive()

    return again


def json_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, or None; also None where it holds more values than any door takes."""
    try:
        check_structure(raw)
        value = read_json_text(raw)
    except (ValueError, InvalidInput):
        return None
    return value if isinstance(value, dict) else None
