"""JSON that strangers wrote, read without falling over its depth (values; request speed).

Whoever walks a value that is nested a thousand deep runs out of stack, wherever that is, so depth is bounded where text becomes a
value. Must not know: whose text it is.
"""

from __future__ import annotations

import json
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
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return bool(level)
