"""POST /v1/responses, and what was kept: /v1/responses/{id} and its input (request speed).

A stored response and the conversation that led to it are a note in the directory, under a lease: any gateway goes on with it.
Must not know: how requests are answered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from antiphon.core.directory import Notes
from antiphon.core.errors import AntiphonError, ContextLengthExceeded, InvalidInput
from antiphon.core.request import FinishReason
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import ChoiceDelta, Started, Usage
from antiphon.gateway.http.event_stream import LAST_EVENT_HEADER, EventStream
from antiphon.gateway.openai.bodies.tools import flat_choice
from antiphon.gateway.openai.http_io import NotFound, deadline_of, error_response
from antiphon.gateway.openai.messages import MessageBody
from antiphon.gateway.openai.parsing import parse, parse_tolerant, warning_header
from antiphon.gateway.openai.responses_schema import ResponsesBody
from antiphon.gateway.openai.serving import answered, parts_of
from antiphon.gateway.text.blocks import Block, Blocks, Change
from antiphon.gateway.text.folded import call_id

_log = logging.getLogger(__name__)

Json = dict[str, Any]

KEPT_S = 3600.0  # a stored response can be gone on with for so long
_TOPIC = "responses"
_DELETED, _DELETED_S = "-", 1.0  # a note can be written over, not removed
_MAX_PAGE = 100


def add_response_routes(app: FastAPI, gateway: Gateway, notes: Notes) -> None:
    """Put the routes into the application."""
    store = ResponseStore(notes)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        raw: Json = {}
        try:
            tenant = gateway.admit(request.headers.get("authorization"))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, ResponsesBody, raw, gateway.config.unknown_fields)
            before = [] if body.previous_response_id is None else await store.conversation(tenant, body.previous_response_id)
            said = await gateway.bodies.work(request, body.messages)
            generation = await gateway.bodies.work(
                request,
                body.request,
                await _fitting(gateway, body, [*before, *said]),
                request_id=request.state.request_id,
                deadline_s=deadline_of(request),
                traceparent=request.headers.get("traceparent"),
            )
            stream = EventStream(gateway.for_tenant(generation, tenant), request.headers.get(LAST_EVENT_HEADER))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            gateway.refused(error, raw.get("model"))
            return error_response(error)
        writer = ResponseWriter(body)

        async def keep() -> None:
            if body.store is not False:
                await store.put(tenant, [*before, *said, writer.message()], writer.body(), body.input_items())

        return answered(gateway, stream, writer, warning_header(ignored), keep)

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        raw: Json = {}
        try:
            tenant = gateway.admit(request.headers.get("authorization"))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, ResponsesBody, raw, gateway.config.unknown_fields)
            async with gateway.admission.unasked(tenant):
                before = [] if body.previous_response_id is None else await store.conversation(tenant, body.previous_response_id)
                said = await gateway.bodies.work(request, body.messages)
                ids = await _prompt_ids(gateway, body, await _fitting(gateway, body, [*before, *said]))
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error, raw.get("model"))
            return error_response(error)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)}, headers=warning_header(ignored))

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        try:
            tenant = gateway.keys.check(request.headers.get("authorization"))
            return JSONResponse(_page(await store.input_items(tenant, response_id), request.query_params))
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error)
            return error_response(error)

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        try:
            tenant = gateway.keys.check(request.headers.get("authorization"))
            await store.delete(tenant, response_id)
            return JSONResponse({"id": response_id, "object": "response", "deleted": True})
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error)
            return error_response(error)

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        try:
            tenant = gateway.keys.check(request.headers.get("authorization"))
            return JSONResponse(await store.response(tenant, response_id))
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error)
            return error_response(error)


async def _fitting(gateway: Gateway, body: ResponsesBody, messages: Sequence[MessageBody]) -> Sequence[MessageBody]:
    """The conversation; with ``truncation: auto`` as many of its last turns as the model's context takes, beside its instructions.

    Where not even the last turn fits, that one: the request is then refused like any other.
    """
    limit = gateway.max_model_len(body.model)
    if body.truncation != "auto" or limit is None:
        return messages
    turns = [0, *(index for index, message in enumerate(messages) if index and message.role == "user")]

    def since(turn: int) -> list[MessageBody]:
        kept = [message for message in messages[: turns[turn]] if message.role in ("system", "developer")]
        return [*kept, *messages[turns[turn] :]]

    async def fits(turn: int) -> bool:
        try:
            return len(await _prompt_ids(gateway, body, since(turn))) + (body.max_output_tokens or 1) <= limit
        except ContextLengthExceeded:
            return False

    low, high = 0, len(turns) - 1
    if await fits(0):
        return messages
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(middle) else (middle + 1, high)
    return since(low)


async def _prompt_ids(gateway: Gateway, body: ResponsesBody, messages: Sequence[MessageBody]) -> tuple[int, ...]:
    asked = body.request(messages, request_id="", deadline_s=None, traceparent=None)
    return await gateway.prompt_ids(asked.model, asked.prompts[0], asked.options)


class ResponseStore:
    """Responses in the directory's notes, each tenant's apart."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    async def put(self, tenant: str, messages: Sequence[MessageBody], response: Json, items: Sequence[Json]) -> None:
        """Keep a response; one that is too large, or comes while the directory is away, is not kept and the answer stands."""
        told = [{"id": f"in_{response['id']}_{index}", **item} for index, item in enumerate(items)]
        text = json.dumps({"messages": [m.model_dump() for m in messages], "response": response, "input": told})
        try:
            await self._notes.put_note(_topic(tenant), _key(tenant, response["id"]), text, KEPT_S)
        except AntiphonError as error:
            _log.warning("a response is not stored: %s", error)

    async def conversation(self, tenant: str, response_id: str) -> list[MessageBody]:
        """What was said up to a response, with it.

        Raises:
            InvalidInput: there is none.
        """
        kept = await self._kept(tenant, response_id)
        if kept is None:
            why = "there is no such stored response, or it has gone"
            raise InvalidInput(f"previous_response_id: {why}", "previous_response_id")
        return [parse(MessageBody, message) for message in kept["messages"]]

    async def response(self, tenant: str, response_id: str) -> Json:
        """A stored response. Raises NotFound."""
        found: Json = (await self._found(tenant, response_id))["response"]
        return found

    async def input_items(self, tenant: str, response_id: str) -> list[Json]:
        """What a stored response answered, oldest first. Raises NotFound."""
        items: list[Json] = (await self._found(tenant, response_id)).get("input", [])
        return items

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a stored response; those that went on from it stay. Raises NotFound."""
        await self._found(tenant, response_id)
        await self._notes.put_note(_topic(tenant), _key(tenant, response_id), _DELETED, _DELETED_S)

    async def _found(self, tenant: str, response_id: str) -> Json:
        kept = await self._kept(tenant, response_id)
        if kept is None:
            raise NotFound(f"there is no stored response {response_id[:128]!r}")
        return kept

    async def _kept(self, tenant: str, response_id: str) -> Json | None:
        text = await self._notes.note(_topic(tenant), _key(tenant, response_id))
        return None if text is None or text == _DELETED else json.loads(text)


def _page(items: Sequence[Json], query: Mapping[str, str]) -> Json:
    """A page of a list, newest first unless ``order`` is asc.

    Raises:
        InvalidInput: a parameter of the address is wrong.
    """
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidInput("order: asc or desc", "order")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= _MAX_PAGE):
        raise InvalidInput(f"limit: a number from 1 to {_MAX_PAGE}", "limit")
    ordered = list(items) if order == "asc" else list(reversed(items))
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise InvalidInput("after: there is no such item", "after")
    start = 0 if after is None else ids.index(after) + 1
    page = ordered[start : start + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(ordered),
    }


def _topic(tenant: str) -> str:
    """Of each tenant its own: whoever stores most loses its own oldest, nobody else's."""
    return f"{_TOPIC}/{hashlib.sha256(tenant.encode()).hexdigest()[:16]}" if tenant else _TOPIC


def _key(tenant: str, response_id: str) -> str:
    return hashlib.sha256(f"{tenant}\n{response_id}".encode()).hexdigest()


class ResponseWriter:
    """One answer in Responses' shapes; an ``openai.serving.Writer``."""

    def __init__(self, asked: ResponsesBody) -> None:
        self._asked = asked
        self._blocks = Blocks()
        self._started: Started | None = None
        self._usage: Json | None = None
        self._status = "in_progress"
        self._num_events = 0

    def start(self, started: Started) -> list[Json]:
        """See ``Writer``."""
        self._started = started
        return self._numbered([{"type": name, "response": self.body()} for name in ("response.created", "response.in_progress")])

    def add(self, delta: ChoiceDelta) -> list[Json]:
        """See ``Writer``."""
        changes = [change for part in parts_of(delta) for change in self._blocks.take(part)]
        if delta.finish_reason is not None:
            changes += self._blocks.close(cut=delta.finish_reason is FinishReason.LENGTH)
            self._status = "incomplete" if delta.finish_reason is FinishReason.LENGTH else "completed"
        return self._numbered([event for change in changes for event in self._events(change)])

    def end(self, usage: Usage) -> list[Json]:
        """See ``Writer``."""
        self._usage = {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_thought_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }
        return self._numbered([{"type": f"response.{self._status}", "response": self.body()}])

    def body(self) -> Json:
        """See ``Writer``."""
        assert self._started is not None, "start() comes first"
        asked = self._asked
        return {
            "id": f"resp_{self._started.request_id}",
            "object": "response",
            "created_at": self._started.created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._started.model,
            "output": [self._item(block) for block in self._blocks.all],
            "parallel_tool_calls": asked.is_parallel,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None if asked.reasoning is None else asked.reasoning.effort, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}}
            if asked.text is None or asked.text.format is None
            else {"format": asked.text.format.flat()},
            "tool_choice": flat_choice(asked.tool_choice),
            "tools": [tool.flat() for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": self._usage,
            "metadata": asked.metadata or {},
        }

    def error(self, error: Exception) -> Response:
        """See ``Writer``."""
        return error_response(error)

    def message(self) -> MessageBody:
        """The answer as a message of the conversation."""
        text, thought = ("\n".join(block.text for block in self._blocks.all if block.kind == kind) for kind in ("text", "thought"))
        calls = [
            {"id": self._call_id(block), "type": "custom", "custom": {"name": block.name, "input": block.text}}
            if block.is_custom
            else {"id": self._call_id(block), "type": "function", "function": {"name": block.name, "arguments": block.text}}
            for block in self._blocks.all
            if block.kind == "call" and block.is_whole
        ]
        return parse(MessageBody, {"role": "assistant", "content": text, "tool_calls": calls, "reasoning_content": thought})

    def _call_id(self, block: Block) -> str:
        assert self._started is not None, "start() comes first"
        return call_id(self._started.request_id, 0, block.call)

    def _item(self, block: Block, *, is_new: bool = False) -> Json:
        assert self._started is not None, "start() comes first"
        name = f"{self._started.request_id}_{block.index}"
        text, status = ("", "in_progress") if is_new else (block.text, "completed" if block.is_whole else "incomplete")
        match block.kind:
            case "thought":
                summary = [] if is_new else [{"type": "summary_text", "text": text}]
                return {"id": f"rs_{name}", "type": "reasoning", "summary": summary, "status": status}
            case "text":
                content = [] if is_new else [_output_text(text)]
                return {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status, "content": content}
            case "call" if block.is_custom:
                called = {"call_id": self._call_id(block), "name": block.name, "input": text}
                return {"id": f"ctc_{name}", "type": "custom_tool_call", "status": status, **called}
            case "call":
                called = {"call_id": self._call_id(block), "name": block.name, "arguments": text}
                return {"id": f"fc_{name}", "type": "function_call", "status": status, **called}

    def _events(self, change: Change) -> list[Json]:
        block = change.block
        place = {"output_index": block.index}
        inner = {"item_id": self._item(block)["id"], **place}
        kind, part, index = _EVENTS["custom" if block.is_custom else block.kind]
        logprobs: Json = {"logprobs": []} if block.kind == "text" else {}
        if change.what == "grow":
            return [{"type": f"{kind}.delta", **inner, **index, "delta": change.text, **logprobs}]
        if change.what == "open":
            begun = [{"type": "response.output_item.added", **place, "item": self._item(block, is_new=True)}]
            return begun if part is None else [*begun, {"type": f"{part}.added", **inner, **index, "part": _part(block, "")}]
        ends: list[Json]
        if block.is_custom:
            ends = [{"type": f"{kind}.done", **inner, "input": block.text}]
        elif block.kind == "call":
            ends = [{"type": f"{kind}.done", **inner, "name": block.name, "arguments": block.text}]
        else:
            ends = [
                {"type": f"{kind}.done", **inner, **index, "text": block.text, **logprobs},
                {"type": f"{part}.done", **inner, **index, "part": _part(block, block.text)},
            ]
        return [*ends, {"type": "response.output_item.done", **place, "item": self._item(block)}]

    def _numbered(self, events: list[Json]) -> list[Json]:
        numbered = [{**event, "sequence_number": self._num_events + n} for n, event in enumerate(events)]
        self._num_events += len(events)
        return numbered


# By kind: the name of what grows, of the part it is in, and how the part is numbered.
_EVENTS: dict[str, tuple[str, str | None, Json]] = {
    "thought": ("response.reasoning_summary_text", "response.reasoning_summary_part", {"summary_index": 0}),
    "text": ("response.output_text", "response.content_part", {"content_index": 0}),
    "call": ("response.function_call_arguments", None, {}),
    "custom": ("response.custom_tool_call_input", None, {}),
}


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _part(block: Block, text: str) -> Json:
    return {"type": "summary_text", "text": text} if block.kind == "thought" else _output_text(text)
