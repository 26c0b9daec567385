"""What stands between a parameter's tags, as JSON of a type that the tool's schema allows (request speed; once per parameter).

Text stays text where the schema has no place for what it looks like: a postcode of digits, or a word null for a name.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from antiphon.core.text.json_text import MAX_DEPTH, is_deeper, read_json_text
from antiphon.gateway.text.chat_options import Tool
from antiphon.gateway.text.schemas.refs import NOTES, Root, kind_of, values_of

_WORDS: Mapping[str, Any] = {"True": True, "False": False, "None": None}
_MAX_REFERENCES = 16
_MAX_PYTHON_CHARS = 16_384
_HALVES = re.compile("[\\ud800-\\udfff]")  # of characters, by themselves: no answer can hold them but escaped


def properties_of(tool: Tool) -> Mapping[str, Any]:
    """A tool's parameters."""
    found = tool.parameters.get("properties")
    return found if isinstance(found, dict) else {}


def spelling(schema: object, root: Root, *, is_strict: bool) -> Literal["text", "json"] | list[Any]:
    """How a parameter's value stands between its tags: as a text, as JSON, or as one of these values.

    A text is as it is, so no word of its schema but its type can hold it: one that is to be held is written as JSON.
    """
    known = root.resolved(schema)
    values = None if known is None else values_of(known)
    words = [] if known is None else [word for word in known if word != "type" and word not in NOTES]
    kinds = root.kinds(schema)
    if values is not None and len(words) == 1:
        return [value for value in values if kind_of(value) in kinds]
    if kinds != {"string"}:
        return "json"
    is_held = known is None or bool(words)
    return "json" if is_strict and is_held else "text"


def read(raw: str, schema: object, root: Root, whole: Mapping[str, Any], *, is_strict: bool) -> str:
    """JSON of the value that ``raw`` stands for; ``root`` looks references up in ``whole``."""
    spelled = spelling(schema, root, is_strict=is_strict)
    if spelled == "json" and raw.strip().startswith('"'):
        try:
            value = read_json_text(raw.strip())
        except ValueError:
            value = None
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
    known = root.resolved(schema)
    return json_of(raw, schema if known is None else known, whole)


def json_of(raw: str, schema: object, root: Mapping[str, Any]) -> str:
    """JSON of the value that ``raw`` stands for; ``root`` is the schema in which references are looked up."""
    kinds = _kinds(schema, root)
    if kinds == {"string"}:
        return json.dumps(raw, ensure_ascii=False)
    known = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(known, list) and raw in known:
        return json.dumps(raw, ensure_ascii=False)
    try:
        value = _value(raw)
    except ValueError:
        value = raw if kinds is None or not kinds <= {"object", "array"} else _python_value(raw)
    is_misfit = kinds is not None and "string" in kinds and kinds.isdisjoint(_kinds_of(value))
    made = json.dumps(raw if is_misfit else value, ensure_ascii=False)
    return made if _HALVES.search(made) is None else json.dumps(value)


def _value(raw: str) -> Any:
    """Raises ValueError: it is neither JSON nor one of Python's words. Line ends may stand in its texts as they are."""
    text = raw.strip()
    if text in _WORDS:
        return _WORDS[text]
    return read_json_text(text, strict=False, parse_constant=_no_number, parse_float=_finite)


def _python_value(raw: str) -> Any:
    """The value of a list or dict as Python writes it, where JSON was asked for; else the text itself."""
    try:
        if len(raw) > _MAX_PYTHON_CHARS:
            return raw
        value = ast.literal_eval(raw.strip())
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return raw
    return value if isinstance(value, list | dict) and not is_deeper(value, MAX_DEPTH) else raw


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _no_number(number)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _kinds_of(value: object) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case None:
            return {"null"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def _kinds(schema: object, root: Mapping[str, Any], num_references: int = 0) -> set[str] | None:
    """The types that a schema allows; None = it does not say."""
    if not isinstance(schema, dict) or num_references > _MAX_REFERENCES:
        return None
    if "const" in schema:
        return _kinds_of(schema["const"])
    if isinstance(schema.get("enum"), list):
        return {kind for value in schema["enum"] for kind in _kinds_of(value)}
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {kind for kind in named if isinstance(kind, str)}
    if isinstance(schema.get("$ref"), str):
        return _kinds(_referred(schema["$ref"], root), root, num_references + 1)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            each = [_kinds(one, root, num_references + 1) for one in schema[word]]
            known = [kinds for kinds in each if kinds is not None]
            return set().union(*known) if known and len(known) == len(each) else None
    every = schema.get("allOf")
    if isinstance(every, list):
        return next((kinds for one in every if (kinds := _kinds(one, root, num_references + 1)) is not None), None)
    return None


def _referred(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    if not reference.startswith("#"):
        return None
    for name in filter(None, reference[1:].split("/")):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found
