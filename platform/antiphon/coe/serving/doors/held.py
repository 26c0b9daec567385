"""An HTTP answer that is held back until it is taken: asked for whole, given whole or as a stream (request speed).

Must not know: which answers are taken, who is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Message

from antiphon.coe.serving.combining import Answer, Asked, AskFailed
from antiphon.coe.serving.doors.attempt import json_object

Body = dict[str, Any]

_MAX_BYTES = 16 * 2**20  # of one expert's answer


class Held:
    """The client's end of one expert's answer."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    async def send(self, message: Message) -> None:
        """The expert's side of ASGI.

        Raises:
            AskFailed: it sends more than any answer is.
        """
        if message["type"] == "http.response.body":
            chunk = message.get("body", b"")
            self._size += len(chunk)
            if self._size > _MAX_BYTES:
                raise AskFailed("its answer is too long")
            self._chunks.append(chunk)

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(self._chunks)


async def quiet() -> Message:
    """The client while somebody else watches whether it stays: it says nothing."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")


def asking_body(body: Mapping[str, Any], is_chat: bool) -> Body:
    """The request for a whole answer with the probabilities of its tokens."""
    asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    if is_chat:
        asked["logprobs"] = True
    elif asked.get("logprobs") is None:
        asked["logprobs"] = 0
    return asked


def answer_of(raw: bytes) -> Answer[Body]:
    """The answer in an expert's body.

    Raises:
        AskFailed: it is none.
    """
    body = json_object(raw)
    choices = None if body is None else body.get("choices")
    if body is None or not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise AskFailed("sent what is no answer")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return Answer(
        text=text if isinstance(text, str) else json.dumps(calls, sort_keys=True) if calls else "",
        mean_logprob=_mean_logprob(choice.get("logprobs")),
        num_prompt_tokens=_count(body, "prompt_tokens"),
        num_completion_tokens=_count(body, "completion_tokens"),
        payload=body,
    )


def _mean_logprob(logprobs: object) -> float | None:
    if not isinstance(logprobs, dict):
        return None
    content = logprobs.get("content")
    found = [one.get("logprob") for one in content if isinstance(one, dict)] if isinstance(content, list) else None
    if found is None:
        found = logprobs.get("token_logprobs")
    numbers = [float(one) for one in found if isinstance(one, int | float)] if isinstance(found, list) else []
    return sum(numbers) / len(numbers) if numbers else None


def _count(body: Mapping[str, Any], key: str) -> int:
    usage = body.get("usage")
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def asked_json(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Who said what."""
    return [
        {
            "expert": one.expert,
            "outcome": one.outcome,
            "chance": None if one.chance is None else round(one.chance, 6),
            "prompt_tokens": one.num_prompt_tokens,
            "completion_tokens": one.num_completion_tokens,
            "why": one.why,
        }
        for one in asked
    ]


def given_body(answer: Answer[Body], request: Mapping[str, Any], record: Mapping[str, Any], asked: Sequence[Asked]) -> Body:
    """The taken answer for the client: usage over all who were asked, ``record`` beside it, no probabilities unless asked for."""
    body = dict(answer.payload)
    if not request.get("logprobs") and request.get("logprobs") != 0:
        body["choices"] = [{**choice, "logprobs": None} for choice in body["choices"]]
    prompt, completion = sum(a.num_prompt_tokens for a in asked), sum(a.num_completion_tokens for a in asked)
    own = body.get("usage")
    body["usage"] = {
        **(own if isinstance(own, dict) else {}),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    body["antiphon"] = {**record, "asked": asked_json(asked)}
    return body


def stream_of(body: Body, request: Mapping[str, Any], is_chat: bool) -> bytes:
    """A whole answer as the events of a stream."""
    options = request.get("stream_options")
    with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    head = {name: value for name, value in body.items() if name not in ("choices", "usage", "antiphon", "object")}
    head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    events: list[Body] = []
    for choice in body["choices"]:
        rest = {name: value for name, value in choice.items() if name not in ("message", "text")}
        rest.setdefault("index", 0)
        if is_chat:
            delta = dict(choice.get("message") or {})
            calls = delta.get("tool_calls")
            if isinstance(calls, list):
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
            events.append({**head, "choices": [{**rest, "delta": delta, "finish_reason": None}]})
            end = {"index": rest["index"], "delta": {}, "finish_reason": rest.get("finish_reason")}
            events.append({**head, "choices": [end], "antiphon": body["antiphon"]})
        else:
            events.append({**head, "choices": [{**rest, "text": choice.get("text", "")}], "antiphon": body["antiphon"]})
    if with_usage:
        events.append({**head, "choices": [], "usage": body["usage"]})
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"
