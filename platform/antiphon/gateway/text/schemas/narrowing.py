"""A schema whose grammar takes no more than validators do, where llguidance is laxer or lacks a word (request speed; pure).

- A format of dates or times takes the 29th of February in every year, a year 0000 and a 61st second: a pattern stands beside it.
  A format that the engine lacks is a note, as for validators; one of the internationalised takes what is plain of it.
- A character class without the quote or the backslash, but with control characters, takes both when they are escaped: it loses the
  control characters.
- A number between an integer and a fraction above it, both excluded, may be the integer: the bounds move in.
- Words that say nothing (``uniqueItems: false``) are left out; what can be said otherwise is: see ``keywords`` and ``one_of``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from antiphon.gateway.text.schemas.keywords import loosened, said_otherwise
from antiphon.gateway.text.schemas.one_of import exclusive
from antiphon.gateway.text.schemas.refs import Root

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAYS = "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"
_PATTERNS: Mapping[str, str] = {"date": f"^{_DATE}$", "time": f"^{_TIME}", "date-time": f"^{_DATE}[Tt]{_TIME}"}

_CONTROL = r"\x00-\x1f"

# Of those that are no less plain in other letters.
_PLAIN = {"idn-email": "email", "idn-hostname": "hostname", "iri": "uri"}
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})

# Where a schema holds others: by itself, in a list, by name.
_ONE = ("additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def narrowed(schema: Any, *, is_strict: bool = True) -> Any:
    """The schema; what takes no more than it should stays as it is.

    Without ``is_strict``, words that the engine lacks are left out.
    """
    root = Root(schema)
    made = _narrowed(schema, root, is_strict=is_strict)
    definitions: dict[str, Any] = {}
    while len(definitions) < len(root.added()):  # what is added may add more
        name, added = root.added()[len(definitions)]
        definitions[name] = _narrowed(added, root, is_strict=is_strict)
    if definitions and isinstance(made, dict):
        made["$defs"] = {**(made.get("$defs") or {}), **definitions}
    return made


def closed(schema: Any) -> Any:
    """A schema whose objects have no properties but those that it names, where it does not say which others they have."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {**schema}
    for word in (*_ONE, *_LISTS):
        if word in made:
            made[word] = closed(made[word])
    for word in _NAMED:
        if isinstance(made.get(word), Mapping):
            made[word] = {name: closed(one) for name, one in made[word].items()}
    if (made.get("type") == "object" or "properties" in made) and "patternProperties" not in made:
        made.setdefault("additionalProperties", False)
    return made


def _narrowed(schema: Any, root: Root, *, is_strict: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = said_otherwise(schema, root)
    if not isinstance(made, dict):
        return made
    if isinstance(made.get("oneOf"), list):
        made = exclusive(made, root)
    if not is_strict:
        made = loosened(made)
    for word in _ONE:
        if isinstance(made.get(word), Mapping):
            made[word] = _narrowed(made[word], root, is_strict=is_strict)
    for word in _LISTS:
        if isinstance(made.get(word), list):
            made[word] = [_narrowed(one, root, is_strict=is_strict) for one in made[word]]
    for word in _NAMED:
        if isinstance(made.get(word), Mapping):
            made[word] = {name: _narrowed(one, root, is_strict=is_strict) for name, one in made[word].items()}
    if isinstance(made.get("pattern"), str):
        made["pattern"] = _without_leaks(made["pattern"])
    return _with_format(_with_bounds(made))


def _with_bounds(made: dict[str, Any]) -> dict[str, Any]:
    """Bounds between an integer and its neighbour, both excluded: the engine takes the integer. They move in by a thousandth."""
    low: Any = made.get("exclusiveMinimum")
    high: Any = made.get("exclusiveMaximum")
    others = made.get("minimum", low), made.get("maximum", high)
    if any(type(bound) not in (int, float) for bound in (low, high, *others)) or made.get("type") == "integer":
        return made
    if not 0 < high - low < 1:
        return made
    rest = {key: value for key, value in made.items() if key not in ("exclusiveMinimum", "exclusiveMaximum")}
    step = (high - low) / 1000
    return rest | {"minimum": max(low + step, others[0]), "maximum": min(high - step, others[1])}


def _with_format(made: dict[str, Any]) -> dict[str, Any]:
    form = made.get("format")
    if not isinstance(form, str):
        return made
    form = _PLAIN.get(form, form)
    if form not in _FORMATS:
        return {key: value for key, value in made.items() if key != "format"}
    made["format"] = form
    pattern = _PATTERNS.get(form)
    if pattern is not None and "pattern" not in made:
        made["pattern"] = pattern
    elif pattern is not None:
        more = made.get("allOf")
        made["allOf"] = [*(more if isinstance(more, list) else ()), {"pattern": pattern}]
    return made


def _without_leaks(pattern: str) -> str:
    """A pattern whose classes do not take what they exclude, escaped."""
    made, position = "", 0
    while position < len(pattern):
        end = _end_of_class(pattern, position) if pattern[position] == "[" else position + (2 if pattern[position] == "\\" else 1)
        piece = pattern[position:end]
        if piece[0] == "[" and end > position + 1 and _leaks(piece):
            piece = f"[{piece}&&[^{_CONTROL}]]"
        made += piece
        position = end
    return made


def _end_of_class(pattern: str, start: int) -> int:
    """Behind the bracket that closes the class at ``start``; behind its own where none does."""
    depth, position = 0, start
    while position < len(pattern):
        match pattern[position]:
            case "\\":
                position += 1
            case "[":
                depth += 1
                position += pattern.startswith("^", position + 1)
                position += pattern.startswith("]", position + 1)
            case "]":
                depth -= 1
                if depth == 0:
                    return position + 1
        position += 1
    return start + 1


def _leaks(piece: str) -> bool:
    try:
        known = re.compile(piece)
    except re.error:  # of the engine's own syntax
        return True
    return not (known.fullmatch('"') and known.fullmatch("\\")) and any(known.fullmatch(chr(code)) for code in range(32))
