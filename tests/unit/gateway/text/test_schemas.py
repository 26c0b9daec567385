"""Schemas as people's tools write them, held by the engine: which values a grammar takes, and that a validator takes them, too."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from antiphon.gateway.text.chat_options import Tool
from antiphon.gateway.text.formats.base import Rules
from antiphon.gateway.text.schemas.narrowing import narrowed
from antiphon.worker.structure.grammar import limits, why_invalid

CAT = {"type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}, "lives": {"type": "integer"}}}
DOG = {"type": "object", "properties": {"kind": {"const": "dog", "default": "dog"}, "of": {"$ref": "#/$defs/Pet"}}}
PET = {"discriminator": {"propertyName": "kind"}, "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}
PETS = {"$ref": "#/$defs/Pet", "$defs": {"Cat": CAT, "Dog": DOG, "Pet": PET}}
NEEDS_A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NEEDS_B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


VOCABULARY = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def written(schema: Any, *, is_strict: bool = True, white_space: str | None = None) -> str:
    return f"start: {Rules(literal=json.dumps).json(schema, is_strict=is_strict, white_space=white_space)}"


def takes(grammar: str, text: str) -> bool:
    matcher = LLMatcher(VOCABULARY, grammar, log_level=0, limits=limits())
    raw = list(text.encode())
    return bool(matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("schema", "taken", "left_out"),
    [
        (PETS, [{"kind": "cat", "lives": 9}, {"kind": "dog", "of": {"kind": "dog", "of": {"kind": "cat"}}}], [{}, {"lives": 9}]),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "integer"}}}, [None, 3], ["x"]),
        ({"oneOf": [NEEDS_A, NEEDS_B]}, [{"a": 1}, {"b": 1}, {"a": 1, "c": 2}], [{"a": 1, "b": 1}, {}]),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": 1}, {"b": []}],
            [{"a": 1, "b": 1}, {}],
        ),
        ({"oneOf": [{"enum": ["x", "y"]}, {"enum": ["y", "z"]}]}, ["x", "z"], ["y"]),
        ({"oneOf": [{"const": 1}, {"const": 1.0}, {"const": True}]}, [True], [1]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, [[1, 1]], ["x"]),
        (
            {"type": "object", "propertyNames": {"$ref": "#/$defs/c"}, "additionalProperties": {"type": "integer"}}
            | {"$defs": {"c": {"enum": ["red", "blue"]}}},
            [{"red": 1}, {"blue": 2}, {}],
            [{"green": 1}, {"red": "x"}],
        ),
        ({"type": "object", "propertyNames": {"pattern": "^x-"}}, [{"x-a": 1}], [{"a": 1}]),
        ({"type": "object", "propertyNames": {"minLength": 2}}, [{"ab": 1}], [{"a": 1}]),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
            [{"b": 1}, {"a": 1, "b": 1}, {}],
            [{"a": 1}],
        ),
        ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
        ({"type": "object", "properties": {"a": {"not": {}}}}, [{"b": 1}], [{"a": 1}]),
        ({"type": "number", "exclusiveMinimum": 2, "exclusiveMaximum": 2.5}, [2.1, 2.25], [2, 2.5]),
        ({"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": -1}, [-1.25], [-1, -1.5]),
        ({"type": "string", "format": "password"}, ["anything"], [1]),
        ({"type": "string", "format": "idn-email"}, ["a@b.org"], ["ab"]),
        ({"type": "array", "contains": {"type": "string"}, "minContains": 0}, [[1], []], ["x"]),
    ],
)
def test_what_people_write_is_held(schema: Any, taken: list[Any], left_out: list[Any]) -> None:
    grammar = written(schema)
    assert why_invalid(grammar) is None
    for value in taken:
        assert takes(grammar, json.dumps(value)), value
        jsonschema.Draft202012Validator(schema).validate(value)
    for value in left_out:
        assert not takes(grammar, json.dumps(value)), value


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"type": "object"}, NEEDS_A]},
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "object", "propertyNames": {"format": "email"}},
        {"type": "string", "pattern": "^(?=.*[A-Z]).*$"},
    ],
)
def test_what_can_not_be_held_is_refused_unless_it_need_not_be(schema: Any) -> None:
    assert why_invalid(written(schema)) is not None
    tool = Tool(name="f", parameters={"type": "object", "properties": {"a": schema}, "required": ["a"]})
    assert why_invalid(f"start: {Rules(literal=json.dumps).arguments(tool)}") is None


def test_branches_of_many_kinds_cost_little_to_tell_apart() -> None:
    names = [f"n{i}" for i in range(300)]
    wide = {"oneOf": [{"type": "object", "required": names, "properties": {"v": {"minimum": i}}} for i in range(128)]}
    deep: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 20} for i in range(14)}
    nested = {"oneOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d1"}], "$defs": {**deep, "d14": {"type": "string"}}}
    for schema in (wide, nested):
        assert "oneOf" in narrowed(schema), "beyond the bound nothing is found"


def test_white_space_of_json_is_as_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    assert takes(written(schema), '{"a": 1}')
    assert not takes(written(schema, white_space=""), '{"a": 1}')
    assert takes(written(schema, white_space=""), '{"a":1}')
