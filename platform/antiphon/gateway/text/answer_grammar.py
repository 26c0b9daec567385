"""The one grammar of an answer: a thought, then calls, a shape or free text (request speed; pure).

    thinking?  then   shape                       response_format alone
                      calls                       tool_choice required or a name
                      calls | shape               tools beside a shape
                      text without a call | text up to a call, calls      strict tools, or one call at most

Tools that are not strict, with tool_choice auto and parallel calls, bind nothing. Written in llguidance's Lark. Must not know:
tokens but special ones, workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import is_deeper
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions, Tool
from antiphon.gateway.text.formats.base import CallFormat, ChannelFormat, Rules, ThoughtMarkers, lark
from antiphon.gateway.text.schemas.narrowing import closed
from antiphon.worker.structure.checking import BOUND

MAX_SCHEMA_CHARS = 262_144
MAX_PATTERN_CHARS = 32_768  # a text that must come costs its length at every token
MAX_DEPTH = 64
_SAY_NOTHING = ("description", "title", "default", "examples", "$comment")


def answer_grammar(
    options: ChatOptions,
    tools: Sequence[Tool],
    form: CallFormat | None,
    thoughts: ThoughtMarkers | None,
    *,
    is_open: bool,
    special_tokens: Mapping[str, int],
) -> tuple[str | None, str]:
    """The grammar, None when anything goes, and the field that asked for it.

    Raises:
        InvalidInput: a schema is too large or too deep; the field is named.
    """
    rules = Rules(literal=lambda text: _literal(text, special_tokens))
    shape = options.shape
    is_plain = thoughts is None and not isinstance(form, ChannelFormat)
    if shape is not None:
        _check_size(shape)
    if shape is not None and not options.tools and is_plain and shape.kind == "grammar":
        return str(shape.value), shape.field
    body, field, bound = _body(options, tools, form, rules)
    if body is None:
        return None, ""
    thinking = "" if thoughts is None else _thinking(thoughts, rules, is_open=is_open)
    lines = [f"start: {thinking} {body}", f"{BOUND}{bound or body}", *rules.lines, "ANY: /(?s:.*)/", "EMPTY: /[ \\n]{0,4}/"]
    return "\n".join(lines), field


def is_long(options: ChatOptions, num_chars: int) -> bool:
    """Whether the grammar will be made of more than so many characters; found in little time."""
    shape = () if options.shape is None else (options.shape.value,)
    given = [list(each) if isinstance(each, tuple) else each for each in shape]
    return _is_longer([*given, *(tool.parameters for tool in options.callable_tools)], num_chars)


def _body(options: ChatOptions, tools: Sequence[Tool], form: CallFormat | None, rules: Rules) -> tuple[str | None, str, str | None]:
    """What follows a thought, the field that asked for it, and its part that is bound, None = all of it."""
    shape = None if options.shape is None else _shape(options.shape, rules)
    if isinstance(form, ChannelFormat):
        return _in_channels(options, tools, form, shape, rules)
    if form is None or not tools:
        return shape, "" if options.shape is None else options.shape.field, None
    for tool in tools:
        _check(tool.parameters, tool.field)
    parallel = options.parallel_tool_calls
    after = form.grammar(tools, rules, parallel=parallel)
    calls = rules.name(after if form.opening is None else f"{rules.literal(form.opening)} {after}")
    if options.tool_choice == "required":
        return calls, tools[0].field if len(tools) == 1 else options.tool_choice_field, None
    if shape is not None and options.shape is not None:
        if form.opening is None and _may_be_call(options.shape):
            why = (
                "this model's calls are JSON objects with a name: beside tools, a shape must have properties of which none is name"
            )
            raise InvalidInput(f"{options.shape.field}: {why}", options.shape.field)
        return f"({calls} | {rules.name(shape)})", options.shape.field, None
    strict = next((tool.field for tool in tools if tool.strict), None)
    if strict is None and parallel:
        return None, "", None
    return _maybe(form, calls, after, rules), "parallel_tool_calls" if strict is None else strict, calls


def _may_be_call(shape: AnswerShape) -> bool:
    """Whether an answer of this shape could be read as a call where calls are objects without a mark before them."""
    schema = shape.value
    if shape.kind == "choice":
        return any(text.lstrip().startswith("{") for text in schema)
    if shape.kind != "json_schema" or not isinstance(schema, dict):
        return True
    if schema.get("type") in ("array", "string", "number", "integer", "boolean", "null"):
        return False
    known = schema.get("properties")
    closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    return not (schema.get("type") == "object" and closed and isinstance(known, dict) and "name" not in known)


def _in_channels(
    options: ChatOptions, tools: Sequence[Tool], form: ChannelFormat, shape: str | None, rules: Rules
) -> tuple[str | None, str, str | None]:
    """The same, where an answer has a channel of its own and ends after a call."""
    for tool in tools:
        _check(tool.parameters, tool.field)
    calls = form.grammar(tools, rules, parallel=False) if tools else None
    if calls is not None and options.tool_choice == "required":
        return calls, tools[0].field if len(tools) == 1 else options.tool_choice_field, None
    strict = next((tool.field for tool in tools if tool.strict), None)
    # A second thought would be beyond the budget: it is not of the grammar.
    if shape is None and strict is None and options.thinking_budget is None:
        return None, "", None
    final = form.final("ANY" if shape is None else shape, rules)
    field = options.shape.field if options.shape is not None else strict or options.thinking_field
    return final if calls is None else f"({final} | {calls})", field, calls if shape is None else None


def _maybe(form: CallFormat, calls: str, after: str, rules: Rules) -> str:
    """Calls, if any come, and before them any text without their opening."""
    if form.opening is None:
        rules.lines.append("OTHER: /([^{ \\n](?s:.*))?/")
        return f"({calls} | OTHER)"
    opening = rules.literal(form.opening)
    if opening.startswith("<["):  # a special token, which no text holds
        return f"ANY ({calls})?"
    pattern = re.sub(r"([][.^$*+?(){}|\\/&~])", r"\\\1", form.opening)
    rules.lines.append(f"OTHER: /(?s:.*)/ & ~/(?s:.*){pattern}(?s:.*)/")
    return f"(OTHER | {rules.until(form.opening)} {after})"


def _thinking(thoughts: ThoughtMarkers, rules: Rules, *, is_open: bool) -> str:
    rest = f"{rules.through(thoughts.end)} EMPTY"
    return rest if is_open else f"(EMPTY {rules.literal(thoughts.start)} {rest})?"


def _shape(shape: AnswerShape, rules: Rules) -> str:
    match shape.kind:
        case "json_object":
            return rules.json({"type": "object"}, white_space=shape.white_space)
        case "json_schema":
            _check(shape.value, shape.field)
            return rules.json(closed(shape.value) if shape.closes_objects else shape.value, white_space=shape.white_space)
        case "regex":
            pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", str(shape.value)).replace("\n", "\\n")
            return rules.name(f"/{pattern}/")
        case "choice":
            return "(" + " | ".join(rules.literal(text) for text in shape.value) + ")"
        case "grammar":
            return lark(str(shape.value))


def _check_size(shape: AnswerShape) -> None:
    texts = shape.value if shape.kind == "choice" else [shape.value] if shape.kind in ("regex", "grammar") else []
    longest, total = max(map(len, texts), default=0), sum(map(len, texts))
    if longest > MAX_PATTERN_CHARS:
        raise InvalidInput(f"{shape.field}: {longest} characters are above the limit of {MAX_PATTERN_CHARS}", shape.field)
    if total > MAX_SCHEMA_CHARS:
        raise InvalidInput(f"{shape.field}: {total} characters are above the limit of {MAX_SCHEMA_CHARS}", shape.field)


def _check(schema: object, field: str) -> None:
    if schema is False:
        raise InvalidInput(f"{field}: no value fits the schema false", field)
    if _is_longer(schema, MAX_SCHEMA_CHARS):
        raise InvalidInput(f"{field}: the schema is longer than {MAX_SCHEMA_CHARS} characters", field)
    if is_deeper(schema, MAX_DEPTH):
        raise InvalidInput(f"{field}: the schema is nested deeper than {MAX_DEPTH}", field)
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_CHARS:
        raise InvalidInput(f"{field}: the schema has {size} characters, above the limit of {MAX_SCHEMA_CHARS}", field)
    longest = _longest_text(schema) if size > MAX_PATTERN_CHARS else 0
    if longest > MAX_PATTERN_CHARS:
        raise InvalidInput(f"{field}: a value of {longest} characters is above the limit of {MAX_PATTERN_CHARS}", field)


def _longest_text(value: object) -> int:
    """Of texts that an answer is held to; values are no deeper than ``MAX_DEPTH``."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return max((max(len(key), _longest_text(inner)) for key, inner in value.items() if key not in _SAY_NOTHING), default=0)
    return max(map(_longest_text, value), default=0) if isinstance(value, list) else 0


def _is_longer(schema: object, num_chars: int) -> bool:
    """Whether the JSON of a schema is surely longer, found in a time that does not grow with it."""
    waiting = [schema]
    while waiting and num_chars > 0:
        item = waiting.pop()
        match item:
            case str():
                num_chars -= len(item) + 2
            case dict():
                num_chars -= sum(map(len, item)) + 6 * len(item)
                waiting += item.values()
            case list() if set(map(type, item)) == {str}:
                num_chars -= sum(map(len, item)) + 4 * len(item)
            case list():
                num_chars -= 2 * len(item)
                waiting += item
    return num_chars <= 0


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """An expression of ``text``; special tokens in it by their ids."""
    found = [token for token in special_tokens if token in text]
    if not found:
        return json.dumps(text, ensure_ascii=False)
    pieces = re.split("(" + "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True)) + ")", text)
    return " ".join(
        f"<[{special_tokens[piece]}]>" if piece in special_tokens else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    )
