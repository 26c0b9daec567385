"""Messages of a chat as clients write them, to ChatMessage (request speed).

Taken as the ecosystem writes them: text, null or a list of text parts as content; parts with ``cache_control`` and other marks that
change nothing; tool calls and their results; an assistant's thoughts. Must not know: HTTP, templates or tokens.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from antiphon.gateway.generation.request import ChatMessage
from antiphon.gateway.text.chat_options import ToolCall
from antiphon.gateway.text.custom.inputs import as_arguments

MAX_TOOL_CALLS = 1024
# Fields that come back in an assistant's message and say nothing when they are null or empty.
_SAY_NOTHING = ("refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content", "reasoning", "name")
# Marks beside a part's or message's content that no model sees.
_MARKS = ("cache_control", "annotations", "id", "index", "status", "citations", "provider_specific_fields", "thinking_blocks")

# Parts of an assistant's content in which it thought: Anthropic's, Mistral's and the Responses' that clients send back in a chat.
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")


def _without_marks(value: object) -> object:
    return {k: v for k, v in value.items() if k not in _MARKS} if isinstance(value, dict) else value


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        value = _without_marks(value)
        if isinstance(value, dict) and value.get("type") == "refusal" and "refusal" in value:
            return {"type": "refusal", "text": value["refusal"]}
        if isinstance(value, dict) and value.get("type") == "output_text":
            return {k: v for k, v in value.items() if k != "logprobs"}
        return value


class CalledFunction(BaseModel):
    """Which function an assistant called, with what."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=256)
    arguments: str = ""

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if isinstance(value, dict):  # as templates take them, and some clients keep them
            return json.dumps(value, ensure_ascii=False)
        return "" if value is None else value


class ToolCallBody(BaseModel):
    """A call in an assistant's message."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        plain = {k: v for k, v in value.items() if k not in ("index", "cache_control", "provider_specific_fields")}
        called = plain.get("custom")
        if plain.get("type") == "custom" and isinstance(called, dict) and isinstance(called.get("input", ""), str):
            function = {**called, "arguments": as_arguments(called.get("input", ""))}
            function.pop("input", None)
            rest = {k: v for k, v in plain.items() if k != "custom"}
            return {**rest, "type": "function", "function": function}
        return plain


MAX_PARTS = 4096  # of one message


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        if len(value) > MAX_PARTS:
            raise ValueError(f"{len(value)} parts are more than {MAX_PARTS}")
        wrong = [index for index, part in enumerate(value) if not isinstance(part, str | dict)]
        # Only the first wrong part is described: validation would describe every one before it can be told.
        parts = value if not wrong else value[: wrong[0] + 1]
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    raise ValueError("expected a text or a list of parts")


def _without_thoughts(parts: list[Any]) -> tuple[list[Any], list[str]]:
    """An assistant's parts, and the thoughts that were among them; one that nobody can read is left out."""
    said: list[Any] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _THOUGHTS:
            said.append(part)
            continue
        told: object = next((part[key] for key in ("thinking", "reasoning", "text", "summary") if part.get(key)), [])
        for inner in told if isinstance(told, list) else [told]:  # Mistral's are lists of texts
            text = inner.get("text") if isinstance(inner, dict) else inner
            if isinstance(text, str):
                thoughts.append(text)
    return said, thoughts


class MessageBody(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)]
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCallBody] = Field(default_factory=list, max_length=MAX_TOOL_CALLS)
    function_call: CalledFunction | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_the_ecosystem_writes_it(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        plain: dict[Any, Any] = {k: v for k, v in value.items() if k not in _MARKS}
        if plain.get("role") in ("tool", "function") and plain.get("content", "") is None:
            plain["content"] = []
        if plain.get("role") != "assistant":
            return plain
        plain = {k: v for k, v in plain.items() if k not in _SAY_NOTHING or v not in (None, [], "")}
        thought = plain.pop("reasoning", None)  # the newer name
        if thought is not None:
            plain.setdefault("reasoning_content", thought)
        refusal = plain.pop("refusal", None)
        if isinstance(content := plain.get("content"), list) and len(content) <= MAX_PARTS:
            plain["content"], thoughts = _without_thoughts(content)
            if thoughts:
                plain.setdefault("reasoning_content", "\n".join(thoughts))
        if plain.get("content") is None and isinstance(refusal, str):
            plain["content"] = refusal
        if any(name in plain for name in ("tool_calls", "function_call", "reasoning_content")):
            plain.setdefault("content", [])
        if "content" in plain and plain["content"] is None:
            plain["content"] = []
        return plain

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role == "assistant":
            return self
        if self.tool_calls or self.function_call is not None:
            raise ValueError("only an assistant's message has tool calls")
        return self

    def message(self) -> ChatMessage:
        """The value; several parts are joined by line ends."""
        called = [] if self.function_call is None else [ToolCallBody(function=self.function_call)]
        return ChatMessage(
            role="tool" if self.role == "function" else self.role,
            content="\n".join(part.text for part in self.content),
            name=self.name,
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                for call in (*self.tool_calls, *called)
            ),
            tool_call_id=self.tool_call_id,
            reasoning=self.reasoning_content,
        )
