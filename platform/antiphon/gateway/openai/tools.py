"""Tools and the shape of answers as clients write them, to ChatOptions' values (request speed).

Must not know: HTTP, or how models write calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.gateway.json_text import read_json_text
from antiphon.gateway.openai.parsing import refuse_unsupported
from antiphon.gateway.text.chat_options import AnswerShape, Tool, ToolChoice

MAX_TOOLS = 256
MAX_CHOICE_TEXTS = 4096
_WHITE_SPACE = re.compile(r"(?:\\[stnr]|[ \t\n\r\[\]?*+()|]|\{\d{1,3}(?:,\d{0,3})?\}){0,64}")
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
    if plain.get("type") == "function" and "function" not in plain and "name" in plain:
        return {"type": "function", "function": {k: v for k, v in plain.items() if k != "type"}}
    return plain


class ToolBody(_Part):
    """One of ``tools``."""

    type: Literal["function"]
    function: FunctionBody

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        return _flat_or_nested(value)


class NamedFunction(_Part):
    """A function by name."""

    name: str = Field(min_length=1, max_length=128)


class NamedChoice(_Part):
    """``tool_choice`` that names a function, or one of those that it allows."""

    type: Literal["function"]
    function: NamedFunction

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        return _flat_or_nested(value)


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
            return {"type": "function", "name": choice.function.name}
        case AllowedChoice():
            allowed = choice.allowed_tools
            return {
                "type": "allowed_tools",
                "mode": allowed.mode,
                "tools": [{"type": "function", "name": tool.function.name} for tool in allowed.tools],
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


class SchemaBody(_Part):
    """``response_format.json_schema``."""

    name: str | None = Field(default=None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: object) -> object:
        """Responses writes a schema's fields flat; other servers take a schema with json_object, too."""
        if not isinstance(value, dict) or "json_schema" in value or not isinstance(value.get("schema"), dict | bool):
            return value
        if value.get("type") not in ("json_schema", "json_object"):
            return value
        return {"type": "json_schema", "json_schema": {k: v for k, v in value.items() if k != "type"}}

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    def flat(self) -> dict[str, Any]:
        """As Responses writes it."""
        schema = self.json_schema
        return {"type": self.type} if schema is None else {"type": self.type, **schema.model_dump(by_alias=True)}

    def shape(self, field: str) -> AnswerShape | None:
        """The value; None for plain text."""
        if self.type == "text":
            return None
        if self.type == "json_object" or self.json_schema is None or self.json_schema.schema_ is None:
            return AnswerShape(kind="json_object", field=field)
        return AnswerShape(kind="json_schema", value=self.json_schema.schema_, field=f"{field}.json_schema.schema")


def _as_schema(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return read_json_text(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error


Schema = Annotated[dict[str, Any] | bool, BeforeValidator(_as_schema)]
Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=65_536)]], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]
Pattern = Annotated[str, Field(min_length=1, max_length=65_536)]


class StructuredOutputs(_Part):
    """vLLM's ``structured_outputs``: one of them."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None  # to another engine; there is one

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        return refuse_unsupported(value, {"structural_tag": ()}, "structured_outputs.")

    def shapes(self, field: str) -> list[AnswerShape]:
        """Those that are given.

        Raises:
            InvalidInput: what is said of JSON's white space is none, or there is no JSON.
        """
        found = self._shapes(field)
        of_json = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
        given = [name for name in of_json if getattr(self, name)]
        if given and any(not shape.kind.startswith("json") for shape in found):
            raise InvalidInput(f"{field}.{given[0]}: it is for JSON", f"{field}.{given[0]}")
        space = "" if self.disable_any_whitespace else white_space(self.whitespace_pattern, f"{field}.whitespace_pattern")
        closed = bool(self.disable_additional_properties)
        return [replace(shape, white_space=space, closes_objects=closed) for shape in found]

    def _shapes(self, field: str) -> list[AnswerShape]:
        return [
            *([] if self.json_ is None else [AnswerShape(kind="json_schema", value=self.json_, field=f"{field}.json")]),
            *([] if self.regex is None else [AnswerShape(kind="regex", value=self.regex, field=f"{field}.regex")]),
            *([] if self.choice is None else [AnswerShape(kind="choice", value=tuple(self.choice), field=f"{field}.choice")]),
            *([] if self.grammar is None else [AnswerShape(kind="grammar", value=self.grammar, field=f"{field}.grammar")]),
            *([AnswerShape(kind="json_object", field=f"{field}.json_object")] if self.json_object else []),
        ]


def white_space(pattern: str | None, field: str) -> str | None:
    """A pattern of white space as the engine of grammars reads it. Raises InvalidInput: it is of more than white space."""
    if pattern is None:
        return None
    if _WHITE_SPACE.fullmatch(pattern) is None:
        raise InvalidInput(f"{field}: only white space may stand between JSON's parts", field)
    return pattern.replace("\\s", "[ \\t\\n\\r]")


class StructureFields(BaseModel):
    """The fields of a body that give its answer a shape."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    guided_decoding_backend: str | None = None  # there is one
    guided_whitespace_pattern: str | None = None

    def shape(self) -> AnswerShape | None:
        """What the answer must be; None = anything.

        Raises:
            InvalidInput: more than one shape is asked for.
        """
        found = [
            *([] if self.response_format is None else [self.response_format.shape("response_format")]),
            *([] if self.structured_outputs is None else self.structured_outputs.shapes("structured_outputs")),
            *([] if self.guided_json is None else [AnswerShape(kind="json_schema", value=self.guided_json, field="guided_json")]),
            *([] if self.guided_regex is None else [AnswerShape(kind="regex", value=self.guided_regex, field="guided_regex")]),
            *(
                []
                if self.guided_choice is None
                else [AnswerShape(kind="choice", value=tuple(self.guided_choice), field="guided_choice")]
            ),
            *(
                []
                if self.guided_grammar is None
                else [AnswerShape(kind="grammar", value=self.guided_grammar, field="guided_grammar")]
            ),
        ]
        shapes = [shape for shape in found if shape is not None]
        if len(shapes) > 1:
            raise InvalidInput(f"{shapes[1].field}: the answer has one shape already, by {shapes[0].field}", shapes[1].field)
        if self.guided_whitespace_pattern is None:
            return shapes[0] if shapes else None
        space = white_space(self.guided_whitespace_pattern, "guided_whitespace_pattern")
        if not shapes or not shapes[0].kind.startswith("json"):
            raise InvalidInput("guided_whitespace_pattern: it is for JSON", "guided_whitespace_pattern")
        return replace(shapes[0], white_space=space)


def tools_of(bodies: Sequence[ToolBody]) -> tuple[Tool, ...]:
    """The values.

    Raises:
        InvalidInput: a name is no function's name, or used twice.
    """
    return _tools([(body.function, f"tools[{index}].function") for index, body in enumerate(bodies)])


def functions_of(bodies: Sequence[FunctionBody]) -> tuple[Tool, ...]:
    """The values of tools by their older name. Raises like ``tools_of``."""
    return _tools([(body, f"functions[{index}]") for index, body in enumerate(bodies)])


def _tools(functions: Sequence[tuple[FunctionBody, str]]) -> tuple[Tool, ...]:
    tools: list[Tool] = []
    for function, field in functions:
        if _TOOL_NAME.fullmatch(function.name) is None:
            raise InvalidInput(f"{field}.name: letters, digits and _ . : - only, at most 128", f"{field}.name")
        if any(tool.name == function.name for tool in tools):
            raise InvalidInput(f"{field}.name: {function.name} is there already", f"{field}.name")
        parameters = function.parameters if function.parameters else {"type": "object", "properties": {}}
        tools.append(
            Tool(
                name=function.name,
                description=function.description,
                parameters=parameters,
                strict=bool(function.strict),
                field=f"{field}.parameters",
            )
        )
    return tuple(tools)


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
