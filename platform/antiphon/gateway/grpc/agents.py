"""Tools, shapes and thoughts of the public gRPC door: messages to values and back (request speed).

Fields are checked by the same types as HTTP's bodies. Must not know: how requests are answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.generation.request import ChatMessage
from antiphon.gateway.openai.bodies.shapes import StructuredOutputs
from antiphon.gateway.openai.bodies.tools import (
    MAX_TOOLS,
    ChoiceBody,
    FunctionTool,
    NamedChoice,
    NamedFunction,
    allows_parallel,
    choice_of,
    tools_of,
)
from antiphon.gateway.openai.parsing import parse
from antiphon.gateway.openai.schema import MAX_MESSAGES
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions, ToolCall
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought
from antiphon.rpc.v1 import inference_pb2 as pb

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CHOICES = ("", "none", "auto", "required")
_EFFORTS = ("", "none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAX_BUDGET = 2**31 - 1


def options_of(request: pb.GenerateRequest) -> ChatOptions:
    """What the answer may and must be.

    Raises:
        InvalidInput: a field is wrong; its path is named.
    """
    if not (
        request.tools or request.tool_choice or request.tool_name or request.HasField("shape") or request.HasField("reasoning")
    ):
        return ChatOptions()
    chat_only = "tools" if request.tools else "reasoning" if request.HasField("reasoning") else None
    if chat_only is not None and not request.HasField("chat"):
        raise InvalidInput(f"{chat_only} are for chats", chat_only)
    if len(request.tools) > MAX_TOOLS:
        raise InvalidInput(f"at most {MAX_TOOLS} tools", "tools")
    bodies = [_tool(index, tool) for index, tool in enumerate(request.tools)]
    tools = tools_of(bodies)
    chosen = _choice(request)
    choice, names = choice_of(chosen, tools)
    parallel = request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True
    reasoning = request.reasoning
    if reasoning.effort not in _EFFORTS:
        raise InvalidInput(f"the effort must be one of {', '.join(_EFFORTS[1:])}", "reasoning.effort")
    budget = reasoning.budget_tokens if reasoning.HasField("budget_tokens") else None
    if budget is not None and budget > _MAX_BUDGET:
        raise InvalidInput(f"at most {_MAX_BUDGET} tokens", "reasoning.budget_tokens")
    thinking = reasoning.enabled if reasoning.HasField("enabled") else None
    return ChatOptions(
        tools=tools,
        tool_choice=choice,
        tool_names=names,
        parallel_tool_calls=allows_parallel(chosen, asked=parallel),
        shape=_shape(request.shape) if request.HasField("shape") else None,
        thinking=reasoning.effort != "none" if thinking is None and reasoning.effort else thinking,
        effort=reasoning.effort or None,
        thinking_budget=budget,
        thinking_field="reasoning.budget_tokens",
        effort_field="reasoning.enabled" if thinking is not None else "reasoning.effort",
    )


def messages_of(messages: Sequence[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    """A chat's messages. Raises InvalidInput."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidInput(f"a chat has 1 to {MAX_MESSAGES} messages", "chat.messages")
    for index, message in enumerate(messages):
        where = f"chat.messages[{index}]"
        if message.role not in _ROLES:
            raise InvalidInput(f"the role must be one of {', '.join(_ROLES)}", f"{where}.role")
        if message.tool_calls and message.role != "assistant":
            raise InvalidInput("only an assistant's message has calls", f"{where}.tool_calls")
    return tuple(
        ChatMessage(
            role=m.role,
            content=m.content,
            name=m.name or None,
            tool_calls=tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in m.tool_calls),
            tool_call_id=m.tool_call_id or None,
            reasoning=m.reasoning or None,
        )
        for m in messages
    )


def parts_of(parts: Iterable[Part]) -> list[pb.Part]:
    """The messages of an answer's parts."""
    return [_part(part) for part in parts]


def _part(part: Part) -> pb.Part:
    match part:
        case Thought():
            return pb.Part(thought=part.text)
        case Text():
            return pb.Part(text=part.gap + part.text)
        case CallBegin():
            return pb.Part(call_begin=pb.CallBegin(index=part.index, name=part.name))
        case CallArguments():
            return pb.Part(call_arguments=pb.CallArguments(index=part.index, text=part.text))
        case CallEnd():
            return pb.Part(call_end=part.index)


def _tool(index: int, tool: pb.Tool) -> FunctionTool:
    function: dict[str, Any] = {"name": tool.name, "strict": tool.strict}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = _json(tool.parameters, f"tools[{index}].parameters")
    return parse(FunctionTool, {"type": "function", "function": function}, prefix=f"tools[{index}].")


def _choice(request: pb.GenerateRequest) -> ChoiceBody | None:
    if request.tool_choice not in _CHOICES:
        raise InvalidInput(f"tool_choice must be one of {', '.join(_CHOICES[1:])}", "tool_choice")
    if not request.tool_name:
        return cast(ChoiceBody, request.tool_choice) if request.tool_choice else None
    if request.tool_choice not in ("", "required"):
        raise InvalidInput(f"tool_name says what must be called, tool_choice is {request.tool_choice}", "tool_name")
    if not any(tool.name == request.tool_name for tool in request.tools):
        raise InvalidInput(f"there is no tool {request.tool_name[:128]!r}", "tool_name")
    return NamedChoice(type="function", function=NamedFunction(name=request.tool_name))


def _shape(shape: pb.Shape) -> AnswerShape | None:
    kind = shape.WhichOneof("kind")
    match kind:
        case "json_object":
            return AnswerShape(kind="json_object", field="shape.json_object") if shape.json_object else None
        case "json_schema":
            value = _json(shape.json_schema, "shape.json_schema")
            if not isinstance(value, dict | bool):
                raise InvalidInput("a schema is a JSON object", "shape.json_schema")
            return AnswerShape(kind="json_schema", value=value, field="shape.json_schema")
        case "regex" | "grammar":
            fields = {kind: getattr(shape, kind)}
        case "choices":
            fields = {"choice": list(shape.choices.texts)}
        case _:
            raise InvalidInput("a shape is one of json_object, json_schema, regex, choices and grammar", "shape")
    return parse(StructuredOutputs, fields, prefix="shape.").shapes("shape")[0]


def _json(text: str, field: str) -> Any:
    try:
        return read_json_text(text, unique_keys=True)
    except ValueError as error:
        raise InvalidInput(f"not valid JSON: {error}", field) from error
