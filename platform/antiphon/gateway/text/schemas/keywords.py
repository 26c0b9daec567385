"""Words of schemas that the engine lacks, said by others that it has (request speed; pure).

Only what means the same is written; the rest stays, and the engine refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from antiphon.gateway.text.schemas.refs import Root, values_of

# Words with the values that bind nothing.
_EMPTY: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": ({}, True, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "not": (False,),
    "minProperties": (0,),
}
_LACKING = frozenset(
    ("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames", "dependentRequired")
) | {"dependentSchemas", "unevaluatedProperties", "unevaluatedItems", "minProperties", "maxProperties", "dependencies"}
_LACKING_IN_PATTERNS = re.compile(r"\(\?(?:[=!>]|<[=!])|\\[1-9kbBAzZG]")
_TYPES = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
# What may say more about an object's properties than the object's own words.
_ELSEWHERE = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "not")


def said_otherwise(schema: Mapping[str, Any], root: Root) -> dict[str, Any] | bool:
    """A schema of the same values."""
    made = {key: value for key, value in schema.items() if not any(_same(value, empty) for empty in _EMPTY.get(key, ()))}
    if made.get("not", False) in (True, {}):
        return False
    if "contains" not in made or (made.get("minContains") == 0 and "maxContains" not in made):
        made = {key: value for key, value in made.items() if key not in ("contains", "minContains", "maxContains")}
    if "if" not in made or not ("then" in made or "else" in made):
        for word in ("if", "then", "else"):
            made.pop(word, None)
    if made.get("unevaluatedProperties") is False and not any(word in made for word in _ELSEWHERE):
        del made["unevaluatedProperties"]
        made.setdefault("additionalProperties", False)
    if "dependentRequired" in made:
        made = _with_dependents(made)
    return _with_names(made, root) if "propertyNames" in made else made


def loosened(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without the words and patterns that the engine lacks: of more values."""
    made = {key: value for key, value in schema.items() if key not in _LACKING}
    if isinstance(made.get("pattern"), str) and _LACKING_IN_PATTERNS.search(made["pattern"]):
        del made["pattern"]
    if isinstance(made.get("type"), str) and made["type"] not in _TYPES:
        del made["type"]
    if "oneOf" in made:
        made = {"anyOf" if key == "oneOf" and "anyOf" not in made else key: value for key, value in made.items()}
    made.pop("oneOf", None)
    return made


def _same(value: object, empty: object) -> bool:
    return type(value) is type(empty) and value == empty


def _with_dependents(made: dict[str, Any]) -> dict[str, Any]:
    """``dependentRequired`` as a choice: all of them, or not the first."""
    dependents = made["dependentRequired"]
    if made.get("type") != "object" or not isinstance(dependents, Mapping):
        return made
    required = list(made.get("required") or ())
    choices = []
    for name, others in dependents.items():
        if not isinstance(others, list):
            return made
        if name in required:
            required += [other for other in others if other not in required]
        elif others:
            needs = {"type": "object", "required": [name, *others]}
            choices.append({"anyOf": [needs, {"type": "object", "properties": {name: False}}]})
    rest = {key: value for key, value in made.items() if key != "dependentRequired"}
    if required:
        rest["required"] = required
    if choices:
        more = rest.get("allOf")
        rest["allOf"] = [*(more if isinstance(more, list) else ()), *choices]
    return rest


def _with_names(made: dict[str, Any], root: Root) -> dict[str, Any]:
    """``propertyNames`` as the properties there may be, or a pattern of theirs."""
    names = root.resolved(made["propertyNames"])
    known = made.get("properties") or {}
    if names is None or made.get("patternProperties") or not isinstance(known, Mapping):
        return made
    rest = {key: value for key, value in made.items() if key != "propertyNames"}
    others = made.get("additionalProperties", True)
    words = {key for key in names if key not in ("type", "title", "description")}
    values = values_of(names)
    if values is not None and words <= {"enum", "const"}:
        texts = [value for value in values if isinstance(value, str)]
        allowed = {name: known.get(name, others) for name in texts}
        forbidden = {name: False for name in made.get("required") or () if name not in allowed}
        return {**rest, "properties": {**allowed, **forbidden}, "additionalProperties": False}
    pattern = _pattern(names, words)
    if pattern is None or known:
        return made
    return {**rest, "patternProperties": {pattern: others}, "additionalProperties": False}


def _pattern(names: Mapping[str, Any], words: set[str]) -> str | None:
    if words == {"pattern"} and isinstance(names["pattern"], str):
        return str(names["pattern"])
    if words and words <= {"minLength", "maxLength"}:
        low, high = names.get("minLength", 0), names.get("maxLength", "")
        if re.fullmatch(r"\d{1,6},\d{0,6}", f"{low},{high}"):
            return f"^[\\s\\S]{{{low},{high}}}$"
    return None
