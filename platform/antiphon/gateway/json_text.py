"""JSON that strangers wrote, read without falling over its depth (values; request speed).

Whoever walks a value that is nested a thousand deep runs out of stack, wherever that is, so depth is bounded where text becomes a
value. Must not know: whose text it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

MAX_DEPTH: Final = 128  # of lists and objects in each other


def read_json_text(text: str | bytes) -> Any:
    """The value of JSON text that stands within a message.

    Raises:
        ValueError: it is no JSON, or nested deeper than MAX_DEPTH.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if is_deeper(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects stand more than ``depth`` deep in each other."""
    level = containers([value])
    for _ in range(depth):
        level = [item for held in level for item in containers(held.values() if isinstance(held, dict) else held)]
        if not level:
            return False
    return bool(level)


def containers(values: Collection[object]) -> list[dict[str, Any] | list[Any]]:
    """Lists and objects among values of JSON; a hundred thousand texts take a millisecond, as the event loop must not wait."""
    if {dict, list}.isdisjoint(map(type, values)):
        return []
    return [each for each in values if isinstance(each, dict | list)]
