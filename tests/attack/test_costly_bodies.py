"""Bodies that cost far more than they should: deep, huge, many. Each ends in a 4xx by name, and delays nobody for long."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from antiphon.gateway.openai.http_io import ClientBound

_path = Path(__file__).parents[1] / "contract" / "doors" / "fake_engine.py"
_spec = importlib.util.spec_from_file_location("doors_fake_engine", _path)
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

USER = {"role": "user", "content": "hi"}
TEMPLATE = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + fake.CHAT_TEMPLATE
RANKER = {"architectures": ["Qwen3ForSequenceClassification"], "hidden_size": 4, "num_labels": 1}
LARGE = 4 * 2**20 - 500
LATE_S = 3.0  # of an event loop on a machine that does much else; each of these held it for longer


class Raw(str):
    """JSON as it is."""

    __slots__ = ()


def dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str.__str__(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value)


def deep(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "tiny", "messages": [USER], "max_tokens": 1, **fields}


def responses(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {"model": "tiny", "input": "x", "max_output_tokens": 1, **fields}


def called(arguments: str, content: str = "x") -> tuple[str, dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return chat(messages=[USER, {"role": "assistant", "content": content, "tool_calls": [call]}])


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


HALF = Raw('"\\ud800"')


def deep_bodies(depth: int) -> dict[str, tuple[str, dict[str, Any]]]:
    text = '{"a":' + deep(depth) + "}"
    value = {"a": deep(depth)}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": value}]}
    return {
        "tools": chat(tools=[tool(value)]),
        "unused tools": chat(tools=[tool(value)], tool_choice="none"),
        "calls": called(text),
        "calls beside a marker": called(text, "<|im_end|>"),
        "schema": chat(guided_json=value),
        "schema in a text": chat(guided_json=text),
        "structure in a text": chat(structured_outputs={"json": text}),
        "metadata": responses(metadata=value),
        "function_call": responses(input=[USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": deep(depth)}]),
        "function_call, text": responses(
            input=[USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": str(deep(depth))}]
        ),
        "unknown": chat(nobody=value),
        "content": chat(messages=[{"role": "user", "content": deep(depth)}]),
        "tool_use": ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [USER, used]}),
    }


async def test_depth_anywhere_is_no_error_of_ours(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, chat_template=TEMPLATE, max_model_len=16_384) as world,
        httpx.AsyncClient(base_url=world.url, timeout=30) as http,
    ):
        for depth in (500, 980, 5000):
            for name, (path, body) in deep_bodies(depth).items():
                answer = await http.post(path, content=dumped(body))
                # arguments that are no JSON are text to a template, as before
                assert answer.status_code in ((200, 400) if "call" in name else (400,)), f"{name}, {depth}: {answer.text}"


async def test_what_no_answer_could_repeat_is_refused_by_its_field(tmp_path: Path) -> None:
    cases = {
        "metadata.a": responses(metadata={"a": HALF}),
        "tools[0].description": responses(
            tools=[{"type": "function", "name": "f", "description": HALF, "parameters": {}}], tool_choice="none"
        ),
        "input[0].content[0].text": responses(input=[{"role": "user", "content": [{"type": "input_text", "text": HALF}]}]),
        "input[1].summary": responses(input=[USER, {"type": "reasoning", "summary": 5}]),
        "messages[0].name": chat(messages=[{**USER, "name": HALF}]),
    }
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=30) as http:
        for field, (path, body) in cases.items():
            answer = await http.post(path, content=dumped(body))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
        whole = await http.post("/v1/responses", content=dumped(responses(metadata={"a": Raw('"\\ud83d\\ude00"')})[1]))
        assert whole.json()["metadata"] == {"a": "😀"}, "a whole pair is a character"


async def late_s(http: httpx.AsyncClient, path: str, body: str) -> tuple[httpx.Response, float]:
    """The answer, and how late others' turns on the event loop came meanwhile."""
    late = 0.0

    async def watch() -> None:
        nonlocal late
        while True:
            due = time.monotonic() + 0.02
            await asyncio.sleep(0.02)
            late = max(late, time.monotonic() - due)

    watching = asyncio.create_task(watch())
    try:
        return await http.post(path, content=body), late
    finally:
        watching.cancel()


async def test_a_large_text_is_refused_and_holds_the_loop_up_for_nobody(tmp_path: Path) -> None:
    words = "ab " * (LARGE // 3)
    begun = [USER, {"role": "assistant", "content": words}]
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "a word": ("/tokenize", {"prompt": "a" * LARGE}),
        "words": ("/tokenize", {"prompt": words, "return_token_strs": True}),
        "tokens": ("/detokenize", {"tokens": [65] * 1_000_000}),
        "a begun answer": (
            "/v1/chat/completions",
            {"messages": begun, "continue_final_message": True, "add_generation_prompt": False},
        ),
        "beginnings of markers": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|" * (LARGE // 2)}]}),
    }
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=60) as http:
        for name, (path, body) in cases.items():
            answer, late = await late_s(http, path, json.dumps({"model": "tiny", **body}))
            assert answer.status_code == 400, f"{name}: {answer.text[:200]}"
            assert late < LATE_S, name


async def test_very_many_mistakes_are_not_described_one_by_one(tmp_path: Path) -> None:
    many = {f"k{number}": 1 for number in range(100_000)}
    messages = [{"role": "user", "content": 1, "x": 1}] * 30_000
    cases: dict[str, tuple[str, dict[str, Any], str]] = {
        "fields": ("/v1/completions", {"prompt": "x", "structured_outputs": many}, "structured_outputs.k0"),
        "values": ("/v1/chat/completions", {"messages": [USER], "stop_token_ids": ["a"] * 200_000}, "stop_token_ids"),
        "messages": ("/v1/chat/completions", {"messages": messages}, "messages"),
    }
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=60) as http:
        for name, (path, body, field) in cases.items():
            text = json.dumps({"model": "tiny", **body})
            gc.collect()
            gc.disable()  # or a collection of what all tests before left behind counts as the gateway's work
            try:
                began = time.thread_time()  # of the event loop alone
                answer = await http.post(path, content=text)
                took_s = time.thread_time() - began
            finally:
                gc.enable()
            assert answer.status_code == 400, name
            assert str(answer.json()["error"]["param"]).startswith(field), answer.text
            assert took_s < 1.0, name


async def test_what_is_made_of_a_large_body_takes_the_event_loop_s_time_of_nobody(tmp_path: Path) -> None:
    """Typed fields and messages of a body within all limits took it a second, one body after the other."""
    parts, blocks = ["a"] * 4000, [{"type": "text", "text": "a"}] * 2000
    calls = [{"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}}] * 2000
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}] * 55}),
        "parts to look at": ("/tokenize", {"messages": [{"role": "user", "content": parts}] * 55}),
        "items": ("/v1/responses", {"input": [{"role": "user", "content": parts}] * 55}),
        "blocks": ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": blocks}] * 40}),
        "calls": ("/v1/messages/count_tokens", {"messages": [USER, *[{"role": "assistant", "content": calls}] * 10]}),
    }
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=60) as http:
        for name, (path, body) in cases.items():
            text = json.dumps({"model": "tiny", **body})
            gc.collect()
            gc.disable()  # as above
            try:
                began = time.thread_time()  # of the event loop alone
                answer = await http.post(path, content=text)
                took_s = time.thread_time() - began
            finally:
                gc.enable()
            assert answer.status_code in (200, 400), f"{name}: {answer.text[:200]}"
            assert took_s < 0.3, name


async def test_a_long_query_is_not_tokenized_once_for_each_document(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(RANKER))
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=60) as http:
        body = {"model": "tiny", "query": "ab " * 300_000, "documents": [f"{i}" for i in range(1000)]}
        started = time.process_time()
        answer, late = await late_s(http, "/v1/rerank", json.dumps(body))
        assert answer.status_code == 400, answer.text[:200]
        cut, _ = await late_s(http, "/v1/rerank", json.dumps({**body, "documents": ["a", "b"], "truncate_prompt_tokens": 100}))
        assert cut.status_code == 200, cut.text[:200]
        assert time.process_time() - started < 5.0, "seconds of processor for what has no answer"
    assert late < LATE_S


async def test_an_answer_that_is_late_before_its_first_byte_is_a_timeout_and_no_fault_of_ours() -> None:
    """Under overload the last bound of time can end an answer that has not begun: the server said 500 then."""
    sent: list[Any] = []

    async def produce(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await ClientBound(produce)({"type": "http"}, receive, send)
    assert sent[0]["status"] == 504
    assert json.loads(sent[1]["body"])["error"]["code"] == "deadline_exceeded"
