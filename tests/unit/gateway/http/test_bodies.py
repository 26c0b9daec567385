"""The dearest bodies of 4 MiB cost little, and their first wrong field is told."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest

from antiphon.core.errors import InvalidInput
from antiphon.gateway.http.bodies import parse_object
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
