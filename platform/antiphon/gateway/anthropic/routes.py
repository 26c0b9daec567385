"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes (request speed).

Must not know: how requests are answered.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from antiphon.core.request import FinishReason
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.anthropic.errors import anthropic_error
from antiphon.gateway.anthropic.schema import CountBody, MessagesBody
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import ChoiceDelta, Started, Usage
from antiphon.gateway.http.event_stream import LAST_EVENT_HEADER, EventStream
from antiphon.gateway.openai.http_io import deadline_of
from antiphon.gateway.openai.parsing import parse_tolerant, warning_header
from antiphon.gateway.openai.serving import answered, parts_of
from antiphon.gateway.text.blocks import Block, Blocks, Change
from antiphon.gateway.text.folded import call_id

Json = dict[str, Any]


def add_message_routes(app: FastAPI, gateway: Gateway) -> None:
    """Put the routes into the application."""

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        raw: Json = {}
        try:
            tenant = gateway.admit(authorization_of(request))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, MessagesBody, raw, gateway.config.unknown_fields)
            generation = await gateway.bodies.work(
                request,
                body.request,
                request_id=request.state.request_id,
                deadline_s=deadline_of(request),
                traceparent=request.headers.get("traceparent"),
            )
            stream = EventStream(gateway.for_tenant(generation, tenant), request.headers.get(LAST_EVENT_HEADER))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets Anthropic's error shape
            gateway.refused(error, raw.get("model"))
            return anthropic_error(error)
        return answered(gateway, stream, MessageWriter(), warning_header(ignored))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        raw: Json = {}
        try:
            tenant = gateway.admit(authorization_of(request))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, CountBody, raw, gateway.config.unknown_fields)
            async with gateway.admission.unasked(tenant):
                prompt = await gateway.bodies.work(request, body.prompt)
                ids = await gateway.prompt_ids(body.model, prompt, body.options())
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error, raw.get("model"))
            return anthropic_error(error)
        return JSONResponse({"input_tokens": len(ids)}, headers=warning_header(ignored))


def authorization_of(request: Request) -> str | None:
    """The key, by either header that Anthropic's clients send."""
    key = request.headers.get("x-api-key")
    return request.headers.get("authorization") if key is None else f"Bearer {key}"


class MessageWriter:
    """One answer in Anthropic's shapes; an ``openai.serving.Writer``."""

    def __init__(self) -> None:
        self._blocks = Blocks()
        self._started: Started | None = None
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._usage: Json = {}

    def start(self, started: Started) -> list[Json]:
        """See ``Writer``."""
        self._started = started
        self._usage = {"input_tokens": started.num_prompt_tokens, "output_tokens": 0}
        return [{"type": "message_start", "message": {**self._head(), "content": []}}]

    def add(self, delta: ChoiceDelta) -> list[Json]:
        """See ``Writer``."""
        changes = [change for part in parts_of(delta) for change in self._blocks.take(part)]
        if delta.finish_reason is not None:
            changes += self._blocks.close()
            self._stop_sequence = delta.stop_string
            if delta.finish_reason is FinishReason.LENGTH:
                self._stop_reason = "max_tokens"
            elif delta.stop_string is not None:
                self._stop_reason = "stop_sequence"
            else:
                self._stop_reason = "tool_use" if self._blocks.ends_in_calls else "end_turn"
        return [event for change in changes if (event := self._event(change)) is not None]

    def end(self, usage: Usage) -> list[Json]:
        """See ``Writer``."""
        self._usage = {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_completion_tokens,
        }
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage}, {"type": "message_stop"}]

    def body(self) -> Json:
        """See ``Writer``."""
        return {**self._head(), "content": [self._content(block, whole=True) for block in self._blocks.all]}

    def error(self, error: Exception) -> Response:
        """See ``Writer``."""
        return anthropic_error(error)

    def _head(self) -> Json:
        assert self._started is not None, "start() comes first"
        return {
            "id": f"msg_{self._started.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._started.model,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage,
        }

    def _content(self, block: Block, *, whole: bool) -> Json:
        text = block.text if whole else ""
        match block.kind:
            case "thought":
                return {"type": "thinking", "thinking": text, "signature": ""}
            case "text":
                return {"type": "text", "text": text}
            case "call":
                assert self._started is not None, "start() comes first"
                called = {"id": call_id(self._started.request_id, 0, block.call), "name": block.name}
                return {"type": "tool_use", **called, "input": _object(text) if whole else {}}

    def _event(self, change: Change) -> Json | None:
        index = change.block.index
        match change.what:
            case "open":
                block = self._content(change.block, whole=False)
                return {"type": "content_block_start", "index": index, "content_block": block}
            case "close":
                return {"type": "content_block_stop", "index": index}
            case "grow":
                kinds = {"thought": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
                kind, field = kinds.get(change.block.kind, ("input_json_delta", "partial_json"))
                return {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: change.text}}


def _object(text: str) -> Json:
    """Arguments as an object; what is none, or what JSON has no place for, is shown under a name of its own."""
    try:
        value = read_json_text(text)
        made = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return {"_raw": text}
    if not isinstance(value, dict):
        return {"_raw": text}
    # Halves of characters by themselves have no bytes.
    whole: Json = json.loads(made.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return whole
