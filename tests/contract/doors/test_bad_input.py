"""Whatever clients send, they get a 4xx in OpenAI's shape that names the field, and the server goes on."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path, gateway={"max_request_bytes": 200_000, "unknown_fields": "refuse"}) as made:
        yield made


@pytest.fixture
async def http(world: fake.World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as made:
        yield made


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [USER], "max_tokens": 2, **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 2, **fields}).encode()


def raw_chat(fields: str) -> bytes:
    return ('{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], ' + fields + "}").encode()


# path, body, status, field, code
TABLE: dict[str, tuple[str, bytes, int, str | None, str]] = {
    "malformed JSON": (CHAT, b'{"model": ', 400, None, "invalid_value"),
    "no body": (CHAT, b"", 400, None, "invalid_value"),
    "a list": (CHAT, b"[]", 400, None, "invalid_value"),
    "a string": (CHAT, b'"hello"', 400, None, "invalid_value"),
    "invalid UTF-8": (CHAT, b'{"model": "\xff\xfe"}', 400, None, "invalid_value"),
    "half a surrogate pair": (
        CHAT,
        raw_chat(r'"x": 1').replace(b'"hi"', rb'"\ud800"').replace(b', "x": 1', b""),
        400,
        "messages[0].content",
        "invalid_value",
    ),
    "half a surrogate pair in a prompt": (TEXT, rb'{"model": "tiny", "prompt": "\udfff"}', 400, "prompt", "invalid_value"),
    "half a surrogate pair in a stop": (CHAT, raw_chat(r'"stop": "\ud800", "max_tokens": 1'), 400, "stop", "invalid_value"),
    "half a surrogate pair in the model": (TEXT, rb'{"model": "\udfff", "prompt": "x"}', 400, "model", "invalid_value"),
    "half a surrogate pair in a key": (CHAT, raw_chat(r'"\ud800": 1'), 400, None, "invalid_value"),
    "deep nesting": (CHAT, b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, None, "invalid_value"),
    "an endless number": (CHAT, raw_chat('"max_tokens": ' + "9" * 10_000), 400, None, "invalid_value"),
    "NaN": (CHAT, raw_chat('"temperature": NaN'), 400, None, "invalid_value"),
    "Infinity": (CHAT, raw_chat('"temperature": Infinity'), 400, None, "invalid_value"),
    "infinity by overflow": (CHAT, raw_chat('"temperature": 1e999'), 400, "temperature", "invalid_value"),
    "too large a body": (CHAT, b" " * 200_001, 413, None, "request_too_large"),
    "unknown model": (CHAT, chat(model="nobody"), 404, "model", "model_not_found"),
    "unknown model, completions": (TEXT, text(model="nobody"), 404, "model", "model_not_found"),
    "no model": (CHAT, json.dumps({"messages": [USER]}).encode(), 400, "model", "invalid_value"),
    "empty model": (CHAT, chat(model=""), 400, "model", "invalid_value"),
    "model of a wrong type": (CHAT, chat(model=7), 400, "model", "invalid_value"),
    "no messages": (CHAT, b'{"model": "tiny"}', 400, "messages", "invalid_value"),
    "empty messages": (CHAT, chat(messages=[]), 400, "messages", "invalid_value"),
    "messages of a wrong type": (CHAT, chat(messages="hi"), 400, "messages", "invalid_value"),
    "a message of a wrong type": (CHAT, chat(messages=["hi"]), 400, "messages[0]", "invalid_value"),
    "a message without content": (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", "invalid_value"),
    "a message with null content": (
        CHAT,
        chat(messages=[{"role": "user", "content": None}]),
        400,
        "messages[0].content",
        "invalid_value",
    ),
    "an unknown role": (CHAT, chat(messages=[USER, {"role": "wizard", "content": ""}]), 400, "messages[1].role", "invalid_value"),
    "a tool's call in a user's message": (
        CHAT,
        chat(messages=[{**USER, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]),
        400,
        "messages[0]",
        "invalid_value",
    ),
    "an image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
        "invalid_value",
    ),
    "an unknown field of a message": (
        CHAT,
        chat(messages=[{**USER, "mood": "good"}]),
        400,
        "messages[0].mood",
        "unknown_parameter",
    ),
    "an unknown field": (CHAT, chat(temprature=1), 400, "temprature", "unknown_parameter"),
    "no prompt": (TEXT, b'{"model": "tiny"}', 400, "prompt", "invalid_value"),
    "an empty prompt": (TEXT, text(prompt=""), 400, "prompt", "invalid_value"),
    "an empty list of prompts": (TEXT, text(prompt=[]), 400, "prompt", "invalid_value"),
    "an empty prompt among others": (TEXT, text(prompt=["a", ""]), 400, "prompt[1]", "invalid_value"),
    "a prompt of a wrong type": (TEXT, text(prompt={"a": 1}), 400, "prompt", "invalid_value"),
    "a prompt of mixed types": (TEXT, text(prompt=[1, "a"]), 400, "prompt", "invalid_value"),
    "negative token ids": (TEXT, text(prompt=[-1]), 400, "prompt", "invalid_value"),
    "token ids outside the vocabulary": (TEXT, text(prompt=[1, 1_000_000]), 400, "prompt", "invalid_value"),
    "too many choices by prompts": (TEXT, text(prompt=["a"] * 65, n=2), 400, "prompt", "invalid_value"),
    "too long a prompt": (TEXT, text(prompt="what is it? " * 2000), 400, "prompt", "context_length_exceeded"),
    "too long a chat": (
        CHAT,
        chat(messages=[{"role": "user", "content": "hi " * 2000}]),
        400,
        "messages",
        "context_length_exceeded",
    ),
    "more output than fits": (CHAT, chat(max_tokens=1000), 400, "max_tokens", "context_length_exceeded"),
    "more output than fits, by its newer name": (
        CHAT,
        json.dumps({"model": "tiny", "messages": [USER], "max_completion_tokens": 1000}).encode(),
        400,
        "max_completion_tokens",
        "context_length_exceeded",
    ),
    "10,000 stop strings": (CHAT, chat(stop=["x"] * 10_000), 400, "stop", "invalid_value"),
    "an empty stop string": (CHAT, chat(stop=["a", ""]), 400, "stop[1]", "invalid_value"),
    "a long stop string": (CHAT, chat(stop="x" * 1025), 400, "stop[0]", "invalid_value"),
    "a stop of a wrong type": (CHAT, chat(stop=3), 400, "stop", "invalid_value"),
    "n of zero": (CHAT, chat(n=0), 400, "n", "invalid_value"),
    "huge n": (CHAT, chat(n=10**6), 400, "n", "invalid_value"),
    "negative max_tokens": (CHAT, chat(max_tokens=-1), 400, "max_tokens", "invalid_value"),
    "huge max_tokens": (CHAT, chat(max_tokens=10**18), 400, "max_tokens", "invalid_value"),
    "fractional max_tokens": (CHAT, chat(max_tokens=1.5), 400, "max_tokens", "invalid_value"),
    "max_tokens as text": (CHAT, chat(max_tokens="5"), 400, "max_tokens", "invalid_value"),
    "max_tokens as truth": (CHAT, chat(max_tokens=True), 400, "max_tokens", "invalid_value"),
    "max_completion_tokens of zero": (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens", "invalid_value"),
    "negative temperature": (CHAT, chat(temperature=-0.1), 400, "temperature", "invalid_value"),
    "hot temperature": (CHAT, chat(temperature=2.1), 400, "temperature", "invalid_value"),
    "temperature as text": (CHAT, chat(temperature="warm"), 400, "temperature", "invalid_value"),
    "top_p above one": (CHAT, chat(top_p=1.01), 400, "top_p", "invalid_value"),
    "top_k below -1": (CHAT, chat(top_k=-2), 400, "top_k", "invalid_value"),
    "min_p above one": (CHAT, chat(min_p=1.5), 400, "min_p", "invalid_value"),
    "presence_penalty out of range": (CHAT, chat(presence_penalty=2.5), 400, "presence_penalty", "invalid_value"),
    "frequency_penalty out of range": (CHAT, chat(frequency_penalty=-2.5), 400, "frequency_penalty", "invalid_value"),
    "repetition_penalty of zero": (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
    "a huge seed": (CHAT, chat(seed=2**64), 400, "seed", "invalid_value"),
    "logit_bias out of range": (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias[1]", "invalid_value"),
    "logit_bias of words": (CHAT, chat(logit_bias={"the": 1}), 400, "logit_bias", "invalid_value"),
    "logit_bias outside the vocabulary": (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias", "invalid_value"),
    "logit_bias as a list": (CHAT, chat(logit_bias=[1]), 400, "logit_bias", "invalid_value"),
    "stop_token_ids outside the vocabulary": (CHAT, chat(stop_token_ids=[99_999]), 400, "stop_token_ids", "invalid_value"),
    "min_tokens above max_tokens": (CHAT, chat(min_tokens=3), 400, "min_tokens", "invalid_value"),
    "speculation in another word": (CHAT, chat(speculation="none"), 400, "speculation", "invalid_value"),
    "top_logprobs without logprobs": (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "invalid_value"),
    "too many top_logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value"),
    "logprobs as a number in a chat": (CHAT, chat(logprobs=2), 400, "logprobs", "invalid_value"),
    "stream as text": (CHAT, chat(stream="yes"), 400, "stream", "invalid_value"),
    "stream_options without stream": (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
    "an unknown stream option": (CHAT, chat(stream=True, stream_options={"x": 1}), 400, "stream_options.x", "unknown_parameter"),
    "a tool without a function": (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function", "invalid_value"),
    "tools of a model without them": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "f"}}]),
        400,
        "tools",
        "unsupported_parameter",
    ),
    "a tool_choice without tools": (CHAT, chat(tool_choice="required"), 400, "tool_choice", "invalid_value"),
    "a response_format of no kind": (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "invalid_value"),
    "two shapes": (
        CHAT,
        chat(response_format={"type": "json_object"}, guided_regex="a"),
        400,
        "guided_regex",
        "invalid_value",
    ),
    "a schema that is none": (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objet"}}}),
        400,
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    "a shape without an end": (
        CHAT,
        chat(response_format={"type": "json_object"}, ignore_eos=True),
        400,
        "ignore_eos",
        "invalid_value",
    ),
    "a thinking budget of a model that does not think": (
        CHAT,
        chat(thinking_budget=10),
        400,
        "thinking_budget",
        "unsupported_parameter",
    ),
    "nothing to answer": (TEXT, text(max_tokens=0), 400, "max_tokens", "invalid_value"),
    "audio": (CHAT, chat(modalities=["text", "audio"]), 400, "modalities", "unsupported_parameter"),
    "a reasoning_effort": (CHAT, chat(reasoning_effort="high"), 400, "reasoning_effort", "unsupported_parameter"),
    "a suffix": (TEXT, text(suffix="end"), 400, "suffix", "unsupported_parameter"),
    "best_of": (TEXT, text(best_of=3), 400, "best_of", "unsupported_parameter"),
    "a template variable of a wrong type": (
        CHAT,
        chat(chat_template_kwargs={"x": {}}),
        400,
        "chat_template_kwargs.x",
        "invalid_value",
    ),
}


async def test_each_wrong_request_is_refused_by_name_and_the_server_goes_on(http: httpx.AsyncClient, world: fake.World) -> None:
    wrong = []
    for name, (path, body, status, field, code) in TABLE.items():
        answer = await http.post(path, content=body, headers={"content-type": "application/json"})
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError):
            wrong.append(f"{name}: no error shape: {answer.status_code} {answer.text[:200]}")
            continue
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            wrong.append(f"{name}: shape {error}")
        if (answer.status_code, error["param"], error["code"]) != (status, field, code):
            wrong.append(f"{name}: {answer.status_code} {error}")
        if "Traceback" in answer.text or error["type"] != "invalid_request_error":
            wrong.append(f"{name}: {answer.text[:200]}")
    assert not wrong, "\n".join(wrong)
    assert world.engine.requests == []
    assert (await http.post(CHAT, content=chat())).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("GET", "/v1/models/who", 404, "model_not_found"),
    ],
)
async def test_wrong_paths_and_methods_have_the_same_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e999"])
async def test_a_wrong_deadline_is_refused(http: httpx.AsyncClient, value: str) -> None:
    answer = await http.post(CHAT, content=chat(), headers={"x-request-timeout-s": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-s"


async def test_an_error_before_the_first_token_of_a_stream_is_no_event_stream(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, content=chat(model="nobody", stream=True))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"


async def test_a_request_id_that_is_none_is_replaced(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, content=chat(), headers={"x-request-id": "a b/" * 99})
    assert answer.status_code == 200
    assert "/" not in answer.headers["x-request-id"]


async def test_a_body_that_lies_about_its_length_is_cut_off(http: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 1000

    answer = await http.post(CHAT, content=endless())
    assert answer.status_code == 413


async def test_bytes_that_are_no_http_leave_the_server_up(http: httpx.AsyncClient, world: fake.World) -> None:
    for noise in (
        b"\x00\xff\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.ports.http_port)
        writer.write(noise)
        await writer.drain()
        writer.write_eof()
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
    assert (await http.get("/health")).status_code == 200


async def test_keys_are_asked_for_where_they_are_configured(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, gateway={"api_keys": frozenset({"one", "two"})}) as world,
        httpx.AsyncClient(base_url=world.url) as http,
    ):
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Basic one"},
            {"authorization": "Bearer ö".encode()},
        ):
            answer = await http.post(CHAT, content=chat(), headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (await http.get("/v1/models", headers=headers)).status_code == 401
        assert (await http.post(CHAT, content=chat(), headers={"authorization": "Bearer two"})).status_code == 200
        assert (await http.get("/health")).status_code == 200
