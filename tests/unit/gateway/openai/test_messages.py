"""What harnesses send back in a chat is read as what it was: thoughts, calls and texts, however they are wrapped."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from antiphon.gateway.generation.request import ChatMessage
from antiphon.gateway.openai.messages import MessageBody


def read(**fields: Any) -> ChatMessage:
    return MessageBody.model_validate({"role": "assistant", **fields}).message()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "reasoning", "text": "hm"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
    ],
)
def test_thoughts_among_an_assistants_parts_are_its_thoughts(part: dict[str, Any]) -> None:
    message = read(content=[part, {"type": "text", "text": "Fine."}])
    assert (message.content, message.reasoning) == ("Fine.", "hm")
    assert read(content=[part]).content == ""
    assert read(content=[part, "Fine."], reasoning_content="other").reasoning == "other"


def test_a_thought_that_nobody_can_read_is_left_out() -> None:
    message = read(content=[{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Fine."}])
    assert (message.content, message.reasoning) == ("Fine.", None)


def test_only_an_assistant_thinks() -> None:
    with pytest.raises(ValidationError, match="content"):
        read(role="user", content=[{"type": "thinking", "thinking": "hm"}])


def test_arguments_may_be_an_object() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Tromsø", "n": [1, None]}}}
    (call,) = read(tool_calls=[called]).tool_calls
    assert call.arguments == '{"city": "Tromsø", "n": [1, null]}'


@pytest.mark.parametrize("content", [None, 1, {"type": "text", "text": "x"}])
def test_what_is_no_content_is_told_in_words(content: Any) -> None:
    with pytest.raises(ValidationError, match="expected a text or a list of parts"):
        read(role="user", content=content)
