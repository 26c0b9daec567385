"""References within a schema, and which kinds of values one takes (request speed; pure)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]

KINDS = frozenset({"null", "boolean", "object", "array", "number", "string"})
_MAX_STEPS = 16  # references one after the other, or schemas one in the other
_MAX_LOOKS = 20_000  # a few milliseconds
BOOLEANS: Mapping[bool, Schema] = {True: {}, False: {"enum": []}}


class Root:
    """The schema that references of its inner ones start from.

    Looking has a bound over all of a schema: beyond it, nothing more is found.
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._num_steps = _MAX_LOOKS
        self._added: dict[tuple[str, ...], tuple[str, Schema]] = {}

    def may_look(self) -> bool:
        """Whether the bound allows one more look."""
        self._num_steps -= 1
        return self._num_steps > 0

    def changed(self, reference: str, change: tuple[str, ...], make: Callable[[], Schema]) -> str:
        """A reference to a definition of its own for what ``make`` gives: once for each reference and change."""
        key = (reference, *change)
        if key not in self._added:
            known = self._schema.get("$defs") if isinstance(self._schema, Mapping) else None
            number = len(self._added)
            while isinstance(known, Mapping) and f"held-{number}" in known:
                number += len(self._added) + 1
            self._added[key] = (f"held-{number}", make())
        return f"#/$defs/{self._added[key][0]}"

    def added(self) -> list[tuple[str, Schema]]:
        """Definitions that were made, by name, in the order of their making."""
        return list(self._added.values())

    def resolved(self, schema: Any) -> Schema | None:
        """What a schema says, where it is a reference alone: what that leads to. None: it leads nowhere, or to more references.

        Beside a reference there may be words that say nothing.
        """
        for _ in range(_MAX_STEPS):
            if not self.may_look():
                return None
            if isinstance(schema, bool):
                return BOOLEANS[schema]
            if not isinstance(schema, Mapping):
                return None
            reference = schema.get("$ref")
            if reference is None:
                return schema
            if not isinstance(reference, str) or any(key not in NOTES for key in schema if key != "$ref"):
                return None
            schema = self._at(reference)
        return None

    def _at(self, reference: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            return None
        found = self._schema
        for step in reference.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                return None
        return found

    def kinds(self, schema: Any, depth: int = 0) -> frozenset[str]:
        """Kinds of values that may be among a schema's; all of them where that is not seen."""
        known = self.resolved(schema)
        if known is None or depth > _MAX_STEPS:
            return KINDS
        found = KINDS
        values = values_of(known)
        if values is not None:
            found &= {kind_of(value) for value in values}
        types = known.get("type")
        if isinstance(types, str | list):
            found &= {"number" if one == "integer" else one for one in ([types] if isinstance(types, str) else types)}
        for word in ("anyOf", "oneOf"):
            if isinstance(known.get(word), list):
                found &= frozenset().union(*(self.kinds(one, depth + 1) for one in known[word]))
        if isinstance(known.get("allOf"), list):
            for one in known["allOf"]:
                found &= self.kinds(one, depth + 1)
        return found


# Words that bind no value.
NOTES = frozenset(
    ("description", "title", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$id", "$schema", "$defs")
) | {"definitions", "discriminator"}


def values_of(schema: Schema) -> list[Any] | None:
    """The values a schema lists; None = it lists none."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def key_of(value: Any) -> str:
    """Equal for values that JSON schemas take for equal: 1 and 1.0 are."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    match value:
        case bool() | str() | None | int():
            return value
        case float():
            return int(value) if value.is_integer() else value
        case list():
            return [_plain(one) for one in value]
        case Mapping():
            return {key: _plain(one) for key, one in value.items()}
    return value


def kind_of(value: Any) -> str:
    """The kind of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
