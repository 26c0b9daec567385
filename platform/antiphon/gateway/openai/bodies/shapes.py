"""The shape an answer must have, as clients write it, to AnswerShape (request speed). Must not know: HTTP, or grammars."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.openai.parsing import refuse_unsupported
from antiphon.gateway.text.chat_options import AnswerShape

MAX_CHOICE_TEXTS = 4096
_WHITE_SPACE = re.compile(r"(?:\\[stnr]|[ \t\n\r\[\]?*+()|]|\{\d{1,3}(?:,\d{0,3})?\}){0,64}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
        return read_json_text(value, unique_keys=True)
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
