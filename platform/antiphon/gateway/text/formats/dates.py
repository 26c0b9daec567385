"""Dates and times that are in the calendar, as patterns beside a schema's ``format`` (request speed; pure).

A grammar of a format alone takes the 29th of February in every year, a year 0000 and a 61st second; validators do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAYS = "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"
_PATTERNS: Mapping[str, str] = {"date": f"^{_DATE}$", "time": f"^{_TIME}", "date-time": f"^{_DATE}[Tt]{_TIME}"}

# Where a schema holds others: by itself, in a list, by name.
_ONE = ("additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def with_calendar(schema: Any) -> Any:
    """The schema with a pattern beside each format of dates and times; schemas that have none come back as they are."""
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for word in _ONE:
        if isinstance(made.get(word), Mapping):
            made[word] = with_calendar(made[word])
    for word in _LISTS:
        if isinstance(made.get(word), list):
            made[word] = [with_calendar(one) for one in made[word]]
    for word in _NAMED:
        if isinstance(made.get(word), Mapping):
            made[word] = {name: with_calendar(one) for name, one in made[word].items()}
    form = made.get("format")
    pattern = _PATTERNS.get(form) if isinstance(form, str) else None
    if pattern is not None and "pattern" not in made:
        made["pattern"] = pattern
    elif pattern is not None:
        more = made.get("allOf")
        made["allOf"] = [*(more if isinstance(more, list) else ()), {"pattern": pattern}]
    return made
