"""Items of a Responses request as a chat's messages."""

from __future__ import annotations

from typing import Any

import pytest

from antiphon.gateway.openai.parsing import parse
from antiphon.gateway.openai.responses_schema import ResponsesBody

CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "noon"}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": text}]}


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([thought("a"), thought("b"), said("assistant", "hi")], [("assistant", "hi", "a\nb", 0)]),
        ([thought("a"), CALL, OUTPUT], [("assistant", "", "a", 1), ("tool", "noon", None, 0)]),
        (
            [thought("a"), said("user", "go on"), said("assistant", "hi")],
            [("assistant", "", "a", 0), ("user", "go on", None, 0), ("assistant", "hi", None, 0)],
        ),
        ([said("assistant", "hi"), thought("a"), CALL], [("assistant", "hi", None, 0), ("assistant", "", "a", 1)]),
        ([thought("a"), said("assistant", "hi"), CALL, CALL], [("assistant", "hi", "a", 2)]),
    ],
)
def test_a_thought_stays_with_what_it_led_to(items: list[Any], expected: list[Any]) -> None:
    messages = [body.message() for body in parse(ResponsesBody, {"model": "m", "input": items}).messages()]
    assert [(m.role, m.content, m.reasoning, len(m.tool_calls)) for m in messages] == expected


@pytest.mark.parametrize(
    ("choice", "asked", "is_parallel"),
    [("auto", None, True), ("auto", False, False), ({"type": "function", "name": "now"}, None, False)],
)
def test_a_named_tool_is_called_once_and_the_body_says_so(choice: Any, asked: bool | None, is_parallel: bool) -> None:
    tools = [{"type": "function", "name": "now"}]
    body = parse(
        ResponsesBody,
        {"model": "m", "input": "x", "tools": tools, "tool_choice": choice, "parallel_tool_calls": asked},
    )
    asks = body.request(body.messages(), request_id="r", deadline_s=None, traceparent=None)
    assert body.is_parallel == asks.options.parallel_tool_calls == is_parallel
