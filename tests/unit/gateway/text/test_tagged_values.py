"""Calls whose arguments are tags: strict ones are valid, whatever the model wants to write."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import ChatOptions, Tool
from antiphon.gateway.text.events import EventParser, ParserSpec
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.formats.registry import CALL_FORMATS
from antiphon.gateway.text.formats.tagged import TaggedFormat

TAGGED = pytest.mark.parametrize("form", [f for f in CALL_FORMATS if isinstance(f, TaggedFormat)], ids=lambda form: form.name)
BYTES = LLTokenizer("byte")
DEFINITIONS = {
    "Color": {"type": "string", "enum": ["red", "dark blue"]},
    "Code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2}$"},
}
HELD: dict[str, Any] = {
    "pattern": {"type": "string", "pattern": "^[a-c]{2,3}$"},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "format": {"type": "string", "format": "date"},
    "const": {"type": "string", "const": "only this"},
    "enum": {"enum": ["a", "b c", 3, None]},
    "color": {"$ref": "#/$defs/Color", "description": "a named class of values"},
    "code": {"$ref": "#/$defs/Code"},
    "either": {"anyOf": [{"$ref": "#/$defs/Code"}, {"type": "string", "pattern": "^x+$", "maxLength": 3}]},
    "maybe": {"anyOf": [{"$ref": "#/$defs/Code"}, {"type": "null"}]},
    "number": {"type": "integer", "minimum": 3, "maximum": 12},
    "nested": {"type": "array", "items": {"$ref": "#/properties/pattern"}, "minItems": 1, "maxItems": 2},
}


def tool(properties: dict[str, Any], *, strict: bool = True, **words: Any) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False, **words}
    return Tool(name="f", parameters={**schema, "$defs": DEFINITIONS}, strict=strict, field="tools[0].function.parameters")


def matcher_of(form: TaggedFormat, made: Tool) -> LLMatcher:
    options = ChatOptions(tools=(made,), tool_choice="required", parallel_tool_calls=False)
    grammar, _ = answer_grammar(options, (made,), form, None, is_open=False, special_tokens={})
    matcher = LLMatcher(BYTES, grammar or "")
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def arguments_of(form: TaggedFormat, made: Tool, answer: str) -> Any:
    parser = EventParser(ParserSpec(calls=form.machine((made,))))
    result = Folded()
    for part in (*parser.feed(answer), *parser.finish(truncated=False)):
        result.add(part)
    (call,) = result.calls
    assert call.is_whole
    return json.loads(call.arguments)


def written(form: TaggedFormat, **values: str) -> str:
    given = "".join(form.parameter[0] + key + form.parameter[1] + value + form.parameter[2] for key, value in values.items())
    return form.around[0] + form.call[0] + "f" + form.call[1] + given + form.call[2] + form.around[1]


def some_answer(form: TaggedFormat, made: Tool, seed: int) -> str:
    """What a model without any sense would write."""
    matcher, chance, answer = matcher_of(form, made), random.Random(seed), bytearray()
    for _ in range(4000):
        if matcher.is_stopped():
            return answer.decode()
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little").nonzero()[0]
        plain = [int(byte) for byte in allowed if byte < 256]
        if not plain:
            return answer.decode()
        answer.append(chance.choice([byte for byte in plain if 32 < byte < 127] or plain))
        matcher.consume_token(answer[-1])
    raise AssertionError(f"it never ends: {answer[-80:]!r}")


@TAGGED
@pytest.mark.parametrize("name", sorted(HELD))
def test_a_strict_call_is_valid_whatever_comes(form: TaggedFormat, name: str) -> None:
    made = tool({"pattern": HELD["pattern"], name: HELD[name]})
    for seed in range(4):
        answer = some_answer(form, made, seed)
        jsonschema.validate(arguments_of(form, made, answer), dict(made.parameters))


@TAGGED
@pytest.mark.parametrize(
    ("name", "right", "value", "wrong"),
    [
        ("pattern", '"abc"', "abc", '"abd"'),
        ("color", "dark blue", "dark blue", '"red"'),
        ("const", "only this", "only this", "another"),
        ("either", '"AB-12"', "AB-12", "AB-12"),
        ("maybe", "null", None, '"null"'),
        ("nested", '["abc"]', ["abc"], '["abd"]'),
    ],
)
def test_what_is_held_is_read_as_it_was_written(form: TaggedFormat, name: str, right: str, value: Any, wrong: str) -> None:
    made = tool({name: HELD[name], **({"pattern": HELD["pattern"]} if name == "nested" else {})})
    more = {"pattern": '"abc"'} if name == "nested" else {}
    for raw, is_right in ((right, True), (wrong, False)):
        answer = written(form, **{name: raw}, **more)
        text = list(answer.encode())
        matcher = matcher_of(form, made)
        assert (matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()) == is_right
    assert arguments_of(form, made, written(form, **{name: right}, **more))[name] == value


@TAGGED
def test_a_text_without_conditions_stays_a_text(form: TaggedFormat) -> None:
    for strict in (False, True):
        made = tool({"note": {"type": "string", "description": "any"}}, strict=strict)
        assert arguments_of(form, made, written(form, note='"in quotes", {}')) == {"note": '"in quotes", {}'}
    loose = tool({"color": HELD["color"], "code": HELD["code"]}, strict=False)
    assert arguments_of(form, loose, written(form, color="red", code="AB-12")) == {"color": "red", "code": "AB-12"}


@TAGGED
@pytest.mark.parametrize(("words", "why"), [({"minProperties": 1}, "minProperties"), ({"required": ["a", "b"]}, "'b'")])
def test_what_tags_cannot_hold_is_refused_by_name(form: TaggedFormat, words: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as raised:
        matcher_of(form, tool({"a": {"type": "string"}}, **words))
    assert (raised.value.field or "").startswith("tools[0].function.parameters")
    matcher_of(form, tool({"a": {"type": "string"}}, strict=False, **words))
