"""Tools and choices among them as clients write them, to ChatOptions' values (request speed).

Must not know: HTTP, or how models write calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.chat_options import Tool, ToolChoice
from antiphon.gateway.text.custom.inputs import tool_of_text

MAX_TOOLS = 256
MAX_GRAMMAR_CHARS = 262_144
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FunctionBody(_Part):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _flat_or_nested(value: object) -> object:
    """Responses writes a tool's function flat, chats nest it; marks for caches change nothing."""
    if not isinstance(value, dict):
        return value
    plain = {k: v for k, v in value.items() if k != "cache_control"}
    kind = plain.get("type")
    if kind in ("function", "custom") and kind not in plain and "name" in plain:
        return {"type": kind, kind: {k: v for k, v in plain.items() if k != "type"}}
    return plain


class FunctionTool(_Part):
    """One of ``tools`` that is called with JSON."""

    type: Literal["function"]
    function: FunctionBody

    @field_validator("type", mode="before")
    @classmethod
    def _is_run_by_the_client(cls, value: object) -> object:
        if value != "function":
            raise ValueError(f"{str(value)[:64]!r} is not supported: there are function and custom, which the client runs")
        return value

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        return _flat_or_nested(value)

    def flat(self) -> dict[str, Any]:
        """As Responses writes it."""
        return {"type": "function", **self.function.model_dump()}


class TextGrammar(_Part):
    """What the text of a call must follow."""

    syntax: Literal["lark", "regex"]
    definition: str = Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)


class TextFormat(_Part):
    """``format`` of a custom tool."""

    type: Literal["text", "grammar"]
    grammar: TextGrammar | None = None

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        """Responses writes the grammar's fields flat."""
        if isinstance(value, dict) and value.get("type") == "grammar" and "grammar" not in value:
            return {"type": "grammar", "grammar": {k: v for k, v in value.items() if k != "type"}}
        return value

    @model_validator(mode="after")
    def _has_its_grammar(self) -> Self:
        if (self.type == "grammar") != (self.grammar is not None):
            raise ValueError("a grammar has a syntax and a definition" if self.grammar is None else "plain text has no grammar")
        return self


class CustomBody(_Part):
    """A tool that is called with a text."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    format: TextFormat | None = None


class CustomTool(_Part):
    """One of ``tools`` that is called with a text instead of JSON."""

    type: Literal["custom"]
    custom: CustomBody

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        return _flat_or_nested(value)

    def flat(self) -> dict[str, Any]:
        """As Responses writes it."""
        form = self.custom.format
        given = {"type": "text"} if form is None or form.grammar is None else {"type": "grammar", **form.grammar.model_dump()}
        return {"type": "custom", "name": self.custom.name, "description": self.custom.description, "format": given}


def _kind_of_tool(value: object) -> str:
    """Which form it has, so that an error speaks of that one alone."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "[custom]" if kind == "custom" else "[function]"


ToolBody = Annotated[
    Annotated[FunctionTool, Tag("[function]")] | Annotated[CustomTool, Tag("[custom]")], Discriminator(_kind_of_tool)
]


class NamedFunction(_Part):
    """A function by name."""

    name: str = Field(min_length=1, max_length=128)


class NamedChoice(_Part):
    """``tool_choice`` that names a tool, or one of those that it allows."""

    type: Literal["function", "custom"]
    function: NamedFunction

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        value = _flat_or_nested(value)
        if isinstance(value, dict) and value.get("type") == "custom" and "custom" in value and "function" not in value:
            return {"function" if name == "custom" else name: given for name, given in value.items()}
        return value


class AllowedTools(_Part):
    """Some of the tools, and whether one of them must be called; others are shown to the model all the same."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedChoice(_Part):
    """``tool_choice`` that allows some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        """Responses writes it flat."""
        if isinstance(value, dict) and value.get("type") == "allowed_tools" and "allowed_tools" not in value:
            return {"type": "allowed_tools", "allowed_tools": {k: v for k, v in value.items() if k != "type"}}
        return value


def allows_parallel(choice: ChoiceBody | None, *, asked: bool) -> bool:
    """Whether an answer may have several calls: a function that is named is called once, as OpenAI's is."""
    return asked and not isinstance(choice, NamedChoice)


def flat_choice(choice: ChoiceBody | None) -> str | dict[str, Any]:
    """As Responses writes it."""
    match choice:
        case NamedChoice():
            return {"type": choice.type, "name": choice.function.name}
        case AllowedChoice():
            allowed = choice.allowed_tools
            return {
                "type": "allowed_tools",
                "mode": allowed.mode,
                "tools": [{"type": tool.type, "name": tool.function.name} for tool in allowed.tools],
            }
        case _:
            return choice or "auto"


def _kind_of_choice(value: object) -> str:
    """Which form it has, so that an error speaks of that one alone; a name in brackets is no part of a field's path."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind == "allowed_tools":
        return "[allowed]"
    return "[named]" if kind is not None or isinstance(value, dict) else "[word]"


ChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[word]")]
    | Annotated[NamedChoice, Tag("[named]")]
    | Annotated[AllowedChoice, Tag("[allowed]")],
    Discriminator(_kind_of_choice),
]


def tools_of(bodies: Sequence[FunctionTool | CustomTool]) -> tuple[Tool, ...]:
    """The values.

    Raises:
        InvalidInput: a name is no tool's name, or used twice; a grammar can't be read.
    """
    named = [
        (body.function, f"tools[{index}].function") if isinstance(body, FunctionTool) else (body.custom, f"tools[{index}].custom")
        for index, body in enumerate(bodies)
    ]
    return _tools(named)


def functions_of(bodies: Sequence[FunctionBody]) -> tuple[Tool, ...]:
    """The values of tools by their older name. Raises like ``tools_of``."""
    return _tools([(body, f"functions[{index}]") for index, body in enumerate(bodies)])


def _tools(bodies: Sequence[tuple[FunctionBody | CustomBody, str]]) -> tuple[Tool, ...]:
    tools: dict[str, Tool] = {}
    for body, field in bodies:
        if _TOOL_NAME.fullmatch(body.name) is None:
            raise InvalidInput(f"{field}.name: letters, digits and _ . : - only, at most 128", f"{field}.name")
        if body.name in tools:
            raise InvalidInput(f"{field}.name: {body.name} is there already", f"{field}.name")
        tools[body.name] = _function(body, field) if isinstance(body, FunctionBody) else _custom(body, field)
    return tuple(tools.values())


def _function(body: FunctionBody, field: str) -> Tool:
    return Tool(
        name=body.name,
        description=body.description,
        parameters=body.parameters if body.parameters else {"type": "object", "properties": {}},
        strict=bool(body.strict),
        field=f"{field}.parameters",
    )


def _custom(body: CustomBody, field: str) -> Tool:
    grammar = None if body.format is None else body.format.grammar
    if grammar is None:
        return tool_of_text(body.name, body.description, field=f"{field}.format")
    where = f"{field}.format.grammar.definition"
    return tool_of_text(body.name, body.description, syntax=grammar.syntax, definition=grammar.definition, field=where)


def choice_of(body: ChoiceBody | None, tools: Sequence[Tool]) -> tuple[ToolChoice, tuple[str, ...] | None]:
    """The choice, and the functions it names; None = it names none.

    Raises:
        InvalidInput: it needs tools that are not there.
    """
    if body is None:
        return ("auto" if tools else "none"), None
    if isinstance(body, NamedChoice):
        name = body.function.name
        if not any(tool.name == name for tool in tools):
            raise InvalidInput(f"tool_choice: there is no tool {name[:128]!r}", "tool_choice")
        return "required", (name,)
    if isinstance(body, AllowedChoice):
        names = tuple(tool.function.name for tool in body.allowed_tools.tools)
        for name in names:
            if not any(tool.name == name for tool in tools):
                raise InvalidInput(f"tool_choice: there is no tool {name[:128]!r}", "tool_choice")
        return body.allowed_tools.mode, names
    if body == "required" and not tools:
        raise InvalidInput("tool_choice: required needs tools", "tool_choice")
    return body, None


def function_choice_of(
    body: Literal["none", "auto"] | NamedFunction | None, tools: Sequence[Tool]
) -> tuple[ToolChoice, tuple[str, ...] | None]:
    """As ``choice_of``, for ``function_call``. Raises InvalidInput: it names a function that is not there."""
    if isinstance(body, NamedFunction):
        if not any(tool.name == body.name for tool in tools):
            raise InvalidInput(f"function_call: there is no function {body.name[:128]!r}", "function_call")
        return "required", (body.name,)
    return body or "auto", None
