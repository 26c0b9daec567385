"""Bodies of Anthropic's Messages, to GenerationRequest (request speed). Must not know: HTTP, tokenizers or workers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.gateway.generation.request import MAX_STOPS, ChatMessage, ChatPrompt, GenerationRequest
from antiphon.gateway.generation.sampling_fields import MAX_TOKEN_ID, SamplingFields, Stop
from antiphon.gateway.openai.bodies.tools import MAX_TOOLS
from antiphon.gateway.openai.messages import MAX_PARTS
from antiphon.gateway.openai.parsing import refuse_unsupported
from antiphon.gateway.openai.schema import MAX_MESSAGES
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions, Tool, ToolCall, ToolChoice


class _Part(BaseModel):
    # Blocks carry marks for caches and citations that change nothing, and clients send them all.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def _as_blocks(value: object) -> object:
    if value is None:
        return []
    if isinstance(value, list) and len(value) > MAX_PARTS:
        raise ValueError(f"{len(value)} blocks are more than {MAX_PARTS}")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Block(_Part):
    """A block of a message's content."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: str = ""
    content: Annotated[list[Block], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    is_error: bool | None = None
    thinking: str = ""


class Message(_Part):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks)]


class ToolBody(_Part):
    """One of ``tools``."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise ValueError(
                f"tools of type {str(kind)[:64]!r} are not supported: there are those that the client runs, with a schema"
            )
        return value


class ToolChoiceBody(_Part):
    """``tool_choice``. A tool that it names may be called several times, unless ``disable_parallel_tool_use`` says otherwise."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("a tool must be named" if self.name is None else f"{self.type} names no tool")
        return self


class Thinking(_Part):
    """``thinking``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)


class OutputFormat(_Part):
    """``output_config.format``."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    """``output_config``."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[list[Block], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    tools: list[ToolBody] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceBody | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # output_config.format by its older name

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        return refuse_unsupported(value, {"mcp_servers": ([],), "container": ()})

    def prompt(self) -> ChatPrompt:
        """The chat; a last message of the assistant is the beginning of the answer."""
        messages: list[ChatMessage] = []
        if self.system:
            messages.append(ChatMessage(role="system", content="\n".join(block.text for block in self.system)))
        for message in self.messages:
            messages += _messages_of(message)
        begun = self.messages[-1].role == "assistant" and not messages[-1].tool_calls
        return ChatPrompt(messages=tuple(messages), add_generation_prompt=not begun, continue_final_message=begun)

    def options(self) -> ChatOptions:
        """Tools, shape and thinking.

        Raises:
            InvalidInput: tool_choice names no tool, or two shapes are asked for.
        """
        tools = tuple(
            Tool(
                name=tool.name,
                description=tool.description,
                parameters=tool.input_schema,
                strict=bool(tool.strict),
                field=f"tools[{index}].input_schema",
            )
            for index, tool in enumerate(self.tools)
        )
        choice = self.tool_choice or ToolChoiceBody(type="auto" if tools else "none")
        kinds: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
        for index, tool in enumerate(tools):
            if any(other.name == tool.name for other in tools[:index]):
                raise InvalidInput(f"tools[{index}].name: {tool.name} is there already", f"tools[{index}].name")
        name = choice.name
        if kinds[choice.type] == "required" and not any(name in (None, tool.name) for tool in tools):
            raise InvalidInput("tool_choice: there is no such tool", "tool_choice")
        return ChatOptions(
            tools=tools,
            tool_choice=kinds[choice.type],
            tool_names=None if name is None else (name,),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            shape=self._shape(),
            effort=None if self.output_config is None else self.output_config.effort,
            thinking=None if self.thinking is None or self.thinking.type == "adaptive" else self.thinking.type == "enabled",
            thinking_budget=None if self.thinking is None else self.thinking.budget_tokens,
            thinking_field="thinking",
            effort_field="thinking",
        )

    def _shape(self) -> AnswerShape | None:
        newer = None if self.output_config is None else self.output_config.format
        if newer is not None and self.output_format is not None:
            raise InvalidInput("output_format: the answer has one shape already, by output_config.format", "output_format")
        if newer is not None:
            return AnswerShape(kind="json_schema", value=newer.schema_, field="output_config.format.schema")
        older = self.output_format
        return None if older is None else AnswerShape(kind="json_schema", value=older.schema_, field="output_format.schema")


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=MAX_TOKEN_ID)
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    stop_sequences: list[Stop] | None = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def request(self, *, request_id: str, deadline_s: float | None, traceparent: str | None) -> GenerationRequest:
        """The value. Raises InvalidInput where fields contradict each other."""
        fields = SamplingFields(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return GenerationRequest(
            request_id=request_id,
            model=self.model,
            prompts=(self.prompt(),),
            sampling=fields.sampling(max_tokens=self.max_tokens, num_logprobs=None),
            operation="chat",
            stop=tuple(self.stop_sequences or ()),
            stream=bool(self.stream),
            deadline_s=deadline_s,
            traceparent=traceparent,
            options=self.options(),
        )


def _messages_of(message: Message) -> list[ChatMessage]:
    """A message's results of tools first, as messages of their own, then what it says and calls."""
    results = [
        ChatMessage(role="tool", content=_result(block), tool_call_id=block.tool_use_id)
        for block in message.content
        if block.type == "tool_result"
    ]
    text = "\n".join(block.text for block in message.content if block.type == "text")
    calls = tuple(
        ToolCall(id=block.id, name=block.name, arguments=json.dumps(block.input, ensure_ascii=False))
        for block in message.content
        if block.type == "tool_use"
    )
    thought = "\n".join(block.thinking for block in message.content if block.type == "thinking")
    if results and not text and not calls:
        return results
    return [*results, ChatMessage(role=message.role, content=text, tool_calls=calls, reasoning=thought or None)]


def _result(block: Block) -> str:
    """What a tool gave; no chat template has a place for a failure, so it is said."""
    text = "\n".join(part.text for part in block.content)
    if not block.is_error:
        return text
    return f"Error: {text}" if text else "Error"
