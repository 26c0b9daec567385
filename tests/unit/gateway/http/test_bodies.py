"""The dearest bodies of 4 MiB cost little, and their first wrong field is told."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from typing import Any

import pytest
from fastapi import Request

from antiphon.core.errors import InvalidInput
from antiphon.gateway.anthropic.schema import CountBody
from antiphon.gateway.http.bodies import LARGE_BYTES, Bodies, parse_object
from antiphon.gateway.openai.messages import MAX_PARTS
from antiphon.gateway.openai.parsing import parse, parse_tolerant
from antiphon.gateway.openai.schema import ChatBody, CompletionBody

M = 4 * 2**20 - 200
DEAR: dict[str, tuple[Any, str]] = {
    "lists of one id": (CompletionBody, '{"model":"m","prompt":[' + "[1]," * (M // 4 - 50) + "[1]]}"),
    "mixed": (CompletionBody, '{"model":"m","prompt":[' + '"a",1,' * (M // 6 - 50) + "1]}"),
    "objects": (CompletionBody, '{"model":"m","prompt":[' + "{}," * (M // 3 - 50) + "{}]}"),
    "messages": (ChatBody, '{"model":"m","messages":[' + '{"x":1},' * (M // 8 - 50) + "{}]}"),
    "parts": (ChatBody, '{"model":"m","messages":[{"role":"user","content":[' + "{}," * (M // 3 - 60) + "{}]}]}"),
    "90k messages": (ChatBody, '{"model":"m","messages":[' + "1," * 90_000 + "1]}"),
    "90k parts": (ChatBody, '{"model":"m","messages":[{"role":"user","content":[' + "1," * 90_000 + "1]}]}"),
    "unknown keys": (CompletionBody, '{"model":"m","prompt":"x",' + ",".join(f'"k{i}":1' for i in range(300_000)) + "}"),
    "stops": (CompletionBody, '{"model":"m","prompt":"x","stop":[' + "1," * (M // 2 - 60) + "1]}"),
    "stop ids": (CompletionBody, '{"model":"m","prompt":"x","stop_token_ids":[' + '"a",' * (M // 4 - 60) + "1]}"),
    "biases": (CompletionBody, '{"model":"m","prompt":"x","logit_bias":{' + ",".join(f'"{i}":"a"' for i in range(300_000)) + "}}"),
    "biases of equal hashes": (
        CompletionBody,
        '{"model":"m","prompt":"x","logit_bias":{' + ",".join(f'"{i * (2**61 - 1)}":1' for i in range(100_000)) + "}}",
    ),
    "deep": (ChatBody, '{"model":"m","messages":[{"role":"user","content":"x"}],"metadata":{"a":' + "[" * (M // 2) + "}}"),
    "quotes": (ChatBody, '{"model":"m",' + '\\"[' * (M // 3)),
    "wrong last id": (CompletionBody, '{"model":"m","prompt":[' + "1," * 700_000 + "-1]}"),
}


@pytest.mark.parametrize("name", DEAR)
def test_a_dear_body_is_refused_for_little(name: str) -> None:
    kind, text = DEAR[name]
    body = text.encode()
    tracemalloc.start()
    started_s = time.process_time()
    with pytest.raises(InvalidInput):
        parse(kind, parse_object(body))
    spent_s = time.process_time() - started_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent_s < 6  # with allocations traced, on a machine that does much else; it was 24 without
    assert peak_bytes < 256 * 2**20  # it was 4 GB


def test_long_prompts_with_brackets_in_their_text_are_taken() -> None:
    text = json.dumps({"model": "m", "prompt": '[{"a": [1, 2]}, "\\\\"]' * 60_000})
    assert parse(CompletionBody, parse_object(text.encode())).prompt.startswith('[{"a"')


def test_many_ids_are_taken() -> None:
    body = parse_object(json.dumps({"model": "m", "prompt": [[7] * 30_000] * 20}).encode())
    request = parse(CompletionBody, body).request(request_id="r", deadline_s=None, traceparent=None)
    assert [len(prompt.token_ids) for prompt in request.prompts] == [30_000] * 20  # type: ignore[union-attr]


def test_thousands_of_unknown_fields_are_refused_for_little_where_unknown_ones_are_ignored() -> None:
    message = {"role": "user", "content": "x", **{f"k{index}": 1 for index in range(30_000)}}
    started_s = time.process_time()
    with pytest.raises(InvalidInput):
        parse_tolerant(ChatBody, {"model": "m", "messages": [message]}, "ignore")
    assert time.process_time() - started_s < 5


async def test_what_is_made_of_a_large_body_is_off_the_event_loop_and_two_at_once() -> None:
    at_once = most = 0
    lock = threading.Lock()
    begun = threading.Barrier(2)

    def make(value: dict[str, Any]) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        begun.wait(30)
        with lock:
            at_once -= 1
        assert value == {"a": "x" * (LARGE_BYTES * 2)}
        return threading.get_ident()

    bodies = Bodies()

    async def asked(text: bytes, work: Any) -> int:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": text, "more_body": False}

        request = Request({"type": "http", "headers": []}, receive)
        value = await bodies.read_json(request, 2**20)
        return int(await bodies.work(request, work, value))

    large = json.dumps({"a": "x" * (LARGE_BYTES * 2)}).encode()
    threads = await asyncio.gather(*(asked(large, make) for _ in range(6)))
    assert threading.get_ident() not in threads
    assert most == 2, "each holds memory, and the interpreter's lock"
    assert await asked(b"{}", lambda _: threading.get_ident()) == threading.get_ident(), (
        "a small one takes less than handing it over"
    )


def test_more_blocks_than_any_message_has_are_refused_before_they_are_looked_at() -> None:
    block = {"type": "text", "text": "a"}
    for content in ([block] * (MAX_PARTS + 1), [{"type": "tool_result", "content": [block] * (MAX_PARTS + 1)}]):
        with pytest.raises(InvalidInput, match="blocks are more than"):
            parse(CountBody, {"model": "m", "messages": [{"role": "user", "content": content}]})
    body = parse(CountBody, {"model": "m", "messages": [{"role": "user", "content": [block] * MAX_PARTS}]})
    assert body.prompt().messages[0].content.count("a") == MAX_PARTS


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"model":"m","prompt":"x","model":"n"}', "model"),
        ('{"model":"m","prompt":"x","mod\\u0065l":"n"}', "model"),
        ('{"model":"m","prompt":"x","model" \n :"n"}', "model"),
        ('{"model":"m","messages":[{"role":"user","content":"x","content":"y"}]}', "content"),
        ('{"model":"m","logit_bias":{"1":5,"2":"\\":","1":-5}}', "1"),
        ('{"model":"m","metadata":{"a\\\\":1,"a\\\\":2,"b":":"}}', "a\\"),
        ('{"model":"m","a":' + "[" * 200 + "]" * 200 + ',"a":1}', "a"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_by_its_name(text: str, key: str) -> None:
    with pytest.raises(InvalidInput, match="is there twice") as refused:
        parse_object(text.encode())
    assert repr(key) in str(refused.value)
    assert refused.value.field == key


def test_equal_keys_of_different_objects_and_within_texts_are_taken() -> None:
    value = {"a": {"a": [{"a": 1}, {"a": 2}]}, "text": '{"a": 1, "a": 2}', "colon": ":", "b\\": '":', "c": ' " : '}
    assert parse_object(json.dumps(value, indent=1).encode()) == value


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_a_token_has_one_bias(kind: Any) -> None:
    body = {"model": "m", "logit_bias": {"5": 100, "05": -100}, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body.pop("prompt" if kind is ChatBody else "messages")
    with pytest.raises(InvalidInput, match="logit_bias: a token is there twice"):
        parse(kind, body)
    assert parse(kind, {**body, "logit_bias": {"05": 1}}).logit_bias == {5: 1}
