"""Answers that are named events or one body: what Responses and Messages share (request speed).

Must not know: any door's shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import ChoiceDelta, Completed, Started, Usage
from antiphon.gateway.http.event_stream import EventStream, one_line
from antiphon.gateway.openai.http_io import ClientBound
from antiphon.gateway.text.parts import Part, Text

SEND_GRACE_S = 5.0  # a client that doesn't read is let go so long after its deadline
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Json = dict[str, Any]


class Writer(Protocol):
    """One answer of one choice, in a door's shapes. Events carry their name as ``type``."""

    def start(self, started: Started) -> list[Json]:
        """The first events."""
        ...

    def add(self, delta: ChoiceDelta) -> list[Json]:
        """What a delta is."""
        ...

    def end(self, usage: Usage) -> list[Json]:
        """The last events; ``body`` is whole now."""
        ...

    def body(self) -> Json:
        """The whole answer."""
        ...

    def error(self, error: Exception) -> Response:
        """An error in the door's shape; its body is also the event of one that comes late."""
        ...


def parts_of(delta: ChoiceDelta) -> tuple[Part, ...]:
    """What a delta means; where nothing reads it, its text is all there is."""
    if delta.parts is not None:
        return delta.parts
    return (Text(text=delta.text),) if delta.text else ()


def answered(
    gateway: Gateway,
    stream: EventStream,
    writer: Writer,
    headers: Mapping[str, str],
    done: Callable[[], Awaitable[None]] | None = None,
) -> Response:
    """The response; ``done`` runs once the answer is whole, before its last byte."""
    generation = stream.generation
    limit_s = gateway.config.max_deadline_s if generation.deadline_s is None else generation.deadline_s
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        response: Response
        try:
            async with aclosing(gateway.generate(generation)) as events:
                async for event in events:
                    _written(writer, event)
            if done is not None:
                await done()
            response = JSONResponse(writer.body(), headers=dict(headers))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets the door's error shape
            response = writer.error(error)
        await response(scope, receive, send)

    async def streamed(scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(stream.events(gateway.generate(generation))) as events:
                async for event in events:
                    made = stream.frame(event, _written(writer, event), named=True)
                    if not started and (not stream.is_replay or isinstance(event, Completed)):
                        await send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *raw]})
                        started = True
                    if isinstance(event, Completed) and done is not None:
                        await done()
                    if made:
                        await send({"type": "http.response.body", "body": made, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            raise  # the client is gone
        except Exception as error:  # noqa: BLE001 - the door, as above
            response = writer.error(error)
            if not started:
                await response(scope, receive, send)
                return
            body = b"event: error\ndata: " + one_line(bytes(response.body).decode()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": False})

    produce = streamed if generation.stream else whole

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(limit_s + SEND_GRACE_S):
            await produce(scope, receive, send)

    return ClientBound(bounded)


def _written(writer: Writer, event: Started | ChoiceDelta | Completed) -> list[Json]:
    match event:
        case Started():
            return writer.start(event)
        case ChoiceDelta():
            return writer.add(event)
        case Completed():
            return writer.end(event.usage)
