"""Bodies of OpenAI's Responses, to GenerationRequest (request speed). Must not know: HTTP, or where earlier responses are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.core.request import MAX_LOGPROBS
from antiphon.gateway.generation.request import ChatMessage, ChatPrompt, GenerationRequest
from antiphon.gateway.generation.sampling_fields import MAX_TOKEN_ID, SamplingFields
from antiphon.gateway.openai.bodies.shapes import ResponseFormat
from antiphon.gateway.openai.bodies.tools import MAX_TOOLS, ChoiceBody, ToolBody, allows_parallel, choice_of, tools_of
from antiphon.gateway.openai.messages import MessageBody
from antiphon.gateway.openai.parsing import UnsupportedField, parse, refuse_unsupported
from antiphon.gateway.openai.schema import MAX_MESSAGES, ReasoningBody
from antiphon.gateway.text.chat_options import ChatOptions

Json = dict[str, Any]

_LOGPROBS = "message.output_text.logprobs"


class TextBody(BaseModel):
    """``text``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: ResponseFormat | None = None
    verbosity: str | None = None


class ResponsesBody(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    input: str | Annotated[list[Json], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[ToolBody] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    stream: bool | None = None
    stream_options: Json | None = None
    store: bool | None = None
    previous_response_id: str | None = Field(default=None, max_length=256)
    background: Literal[False] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    include: list[str] | None = None  # but for log-probabilities, nothing that it names exists here
    # Without influence on the result.
    metadata: Json | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        return refuse_unsupported(value, {"conversation": (), "prompt": (), "moderation": ()})

    @property
    def is_parallel(self) -> bool:
        """Whether the answer may have several calls."""
        return allows_parallel(self.tool_choice, asked=self.parallel_tool_calls is not False)

    def messages(self) -> list[MessageBody]:
        """What ``input`` adds to the conversation.

        Raises:
            InvalidInput: an item is wrong or not supported; it is named.
        """
        if isinstance(self.input, str):
            return [parse(MessageBody, {"role": "user", "content": self.input})]
        return [parse(MessageBody, item, prefix=f"input[{index}].") for index, item in _items(self.input)]

    def input_items(self) -> list[Json]:
        """``input`` as a list of items, each with its type."""
        if isinstance(self.input, str):
            return [_with_parts({"role": "user", "content": self.input})]
        return [_with_parts(item) if item.get("type", "message") == "message" else item for item in self.input]

    def request(
        self, history: Sequence[MessageBody], *, request_id: str, deadline_s: float | None, traceparent: str | None
    ) -> GenerationRequest:
        """The value, with the conversation so far. Raises InvalidInput where fields contradict each other."""
        tools = tools_of(self.tools or [])
        tool_choice, tool_names = choice_of(self.tool_choice, tools)
        reasoning = ReasoningBody() if self.reasoning is None else self.reasoning
        thinking = reasoning.enabled if reasoning.effort is None else reasoning.effort != "none"
        form = None if self.text is None or self.text.format is None else self.text.format.shape("text.format")
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        messages = (*system, *(message.message() for message in history))
        if not messages:
            raise InvalidInput("input: nothing is said", "input")
        if self.top_logprobs:
            raise InvalidInput("top_logprobs: responses give no log-probabilities, chat completions do", "top_logprobs")
        if _LOGPROBS in (self.include or ()):
            raise InvalidInput(f"include: {_LOGPROBS} is not given, chat completions have log-probabilities", "include")
        fields = SamplingFields(temperature=self.temperature, top_p=self.top_p)
        return GenerationRequest(
            request_id=request_id,
            model=self.model,
            prompts=(ChatPrompt(messages=messages, field="input"),),
            sampling=fields.sampling(max_tokens=self.max_output_tokens, num_logprobs=None),
            operation="chat",
            stream=bool(self.stream),
            deadline_s=deadline_s,
            traceparent=traceparent,
            max_tokens_field="max_output_tokens",
            options=ChatOptions(
                tools=tools,
                tool_choice=tool_choice,
                tool_names=tool_names,
                parallel_tool_calls=self.is_parallel,
                shape=form,
                thinking=thinking,
                effort=None if reasoning.effort == "none" else reasoning.effort,
                thinking_budget=reasoning.max_tokens,
                thinking_field="reasoning.max_tokens",
                effort_field="reasoning.enabled" if reasoning.effort is None else "reasoning.effort",
            ),
        )


def _with_parts(item: Json) -> Json:
    """A message whose text is a list of parts, with its type."""
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "output_text" if item.get("role") == "assistant" else "input_text", "text": content}]
    return {"type": "message", **item, "content": content}


def _parts(item: Json, name: str, index: int) -> list[Any]:
    parts = item.get(name) or []
    if not isinstance(parts, list):
        raise InvalidInput(f"input[{index}].{name}: a list of parts is needed", f"input[{index}].{name}")
    return parts


def _call(item: Json) -> Json:
    """A call as chats write it."""
    kind, given = ("custom", "input") if item.get("type") == "custom_tool_call" else ("function", "arguments")
    return {"id": item.get("call_id") or "", "type": kind, kind: {"name": item.get("name"), given: item.get(given) or ""}}


def _items(items: Sequence[Json]) -> list[tuple[int, Json]]:
    """Items as a chat's messages, each with its place; neighbouring calls are one message of the assistant.

    A thought belongs to what the assistant says or calls next; where that is not said, it is a message of its own.
    """
    found: list[tuple[int, Json]] = []
    thoughts: list[str] = []
    for index, item in enumerate(items):
        match item.get("type", "message"):
            case "message":
                said = {"role": item.get("role"), "content": item.get("content")}
            case "reasoning":
                parts = [part for name in ("summary", "content") for part in _parts(item, name, index)]
                thoughts += [str(part["text"]) for part in parts if isinstance(part, dict) and part.get("text")]
                continue
            case "function_call" | "custom_tool_call":
                call = _call(item)
                last = found[-1][1] if found else {}
                if last.get("role") == "assistant" and not thoughts:
                    last.setdefault("tool_calls", []).append(call)
                    continue
                said = {"role": "assistant", "content": None, "tool_calls": [call]}
            case "function_call_output" | "custom_tool_call_output":
                said = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            case other:
                field = f"input[{index}].type"
                raise UnsupportedField(f"{field}: items of type {str(other)[:64]!r} are not supported", field)
        if thoughts and said["role"] == "assistant":
            said["reasoning_content"] = "\n".join(thoughts)
        elif thoughts:
            found.append((index, {"role": "assistant", "content": None, "reasoning_content": "\n".join(thoughts)}))
        thoughts = []
        found.append((index, said))
    return found
