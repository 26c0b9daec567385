"""JSON that strangers wrote, read without falling over its depth or its repeated keys (values; request speed).

Who reads or walks a value that is nested a thousand deep runs out of stack, so the depth is looked at in the text, before anything
is made of it. A key that is there twice means the first to some readers and the last to others: whoever stands before us may have
checked another value than the one that is used. Must not know: whose text it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, Final

MAX_DEPTH: Final = 128  # of lists and objects in each other

READABLE_DEPTH: Final = 512  # leaves half of the stack to whoever reads

_CONTAINERS: Final = frozenset({dict, list})
_ALL: Final = bytes(range(256))
_ALL_BUT_BRACKETS: Final = bytes(set(_ALL) - set(b"[]{}"))
_ALL_BUT_STRUCTURE: Final = bytes(set(_ALL) - set(b'"[]{},'))
_AS_LISTS: Final = bytes.maketrans(b"{}", b"[]")
_ESCAPES: Final = re.compile(rb"\\.", re.DOTALL)
_TEXTS: Final = re.compile(rb'"[^"]*+(?:"|\Z)')  # the last one also without its end
_COLONS: Final = re.compile(rb'"[ \t\n\r]*+:')
_ESCAPED_COLONS: Final = re.compile(rb'\\"(?<!\\\\")[ \t\n\r]*+:')  # by one backslash: two may be a key's last letter


class TooDeep(ValueError):
    """More than MAX_DEPTH lists and objects stand in each other."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} deep")


def read_json_text(text: str | bytes, *, unique_keys: bool = False, **options: Any) -> Any:
    """The value of JSON text, UTF-8 where it is bytes; ``options`` are those of ``json.loads``.

    Raises:
        TooDeep: it is nested deeper than MAX_DEPTH.
        ValueError: it is no JSON, or, with ``unique_keys``, an object has a key twice.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if not json.detect_encoding(raw).startswith("utf-8"):  # bytes of other encodings look like brackets and quotes
        raise ValueError("not UTF-8")
    depth = depth_bound(raw)
    if depth > READABLE_DEPTH:
        raise TooDeep
    keys = KeyCount()
    value = json.loads(text, object_hook=keys.count if unique_keys else None, **options)
    if depth > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise TooDeep
    if unique_keys and (key := keys.repeated(raw)) is not None:
        raise ValueError(f"the key {key[:64]!r} is there twice")
    return value


def depth_bound(raw: bytes) -> int:
    """No less than how deep in each other lists and objects of a text stand; never mind whether it is JSON."""
    brackets = raw.translate(_AS_LISTS, _ALL_BUT_BRACKETS)
    if (num_open := brackets.count(b"[")) <= READABLE_DEPTH:  # those within texts, too
        return num_open
    brackets = structure(raw).replace(b",", b"").translate(_AS_LISTS)
    for depth in range(READABLE_DEPTH + 1):
        outer = brackets.replace(b"[]", b"")  # the innermost go
        if len(outer) == len(brackets):
            return depth + outer.count(b"[")
        brackets = outer
    return READABLE_DEPTH + 1


def structure(raw: bytes) -> bytes:
    """Brackets, braces and commas that are not within texts."""
    if b"\\" in raw:
        raw = _ESCAPES.sub(b"", raw)
    return _TEXTS.sub(b"", raw.translate(None, _ALL_BUT_STRUCTURE))


class KeyCount:
    """Counts the keys of objects while one text is read: pairs one by one would cost as much again as reading."""

    def __init__(self) -> None:
        self.num_keys = 0

    def count(self, made: dict[str, Any]) -> dict[str, Any]:
        """An ``object_hook``."""
        self.num_keys += len(made)
        return made

    def repeated(self, raw: bytes) -> str | None:
        """A key that an object of the text has twice; None = none has.

        Colons behind quotes are those of keys, of texts that begin with one, and of escaped quotes before one: never fewer than the
        keys that were written, so where there are no more than the keys that were kept, none was lost.
        """
        num_colons = len(_COLONS.findall(raw))
        if num_colons != self.num_keys and b"\\" in raw:
            num_colons -= len(_ESCAPED_COLONS.findall(raw))
        return None if num_colons == self.num_keys else _first_repeated(raw)


def _first_repeated(raw: bytes) -> str | None:
    repeated: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs) and not repeated:
            repeated.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return made

    json.loads(raw, object_pairs_hook=as_object)
    return repeated[0] if repeated else None


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
    if len(values) > 8 and _CONTAINERS.isdisjoint(map(type, values)):
        return []
    return [each for each in values if type(each) in _CONTAINERS]  # type: ignore[misc]
