"""``oneOf`` as ``anyOf`` of branches of which no two take the same value (request speed; pure).

The engine takes ``oneOf`` where it sees that branches exclude each other, and looks at no references. Branches that do are written
as ``anyOf``; objects that may be of several branches are held to one: they have the property that tells branches apart, or not the
one that another branch needs. What stays ambiguous is left as it is, and the engine refuses it by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from antiphon.gateway.text.schemas.refs import Root, Schema, key_of, values_of

_MAX_BRANCHES = 128  # pairs are looked at
_MAX_DEPTH = 4  # of properties in properties


def exclusive(schema: dict[str, Any], root: Root) -> dict[str, Any]:
    """A schema with ``oneOf``, without it where that can be said otherwise."""
    branches = schema["oneOf"]
    if not 1 <= len(branches) <= _MAX_BRANCHES:
        return schema
    made = _listed(branches, root) or _apart(branches, root, is_object=schema.get("type") == "object")
    if made is None:
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("oneOf", "discriminator")}
    if "anyOf" not in rest:
        return {**rest, "anyOf": made}
    more = rest.get("allOf")
    return {**rest, "allOf": [*(more if isinstance(more, list) else ()), {"anyOf": made}]}


def _listed(branches: list[Any], root: Root) -> list[Any] | None:
    """Of branches that only list values: those that stand in one of them."""
    lists = []
    for branch in branches:
        known = root.resolved(branch)
        values = None if known is None else values_of(known)
        if known is None or values is None or not set(known) <= {"const", "enum", "title", "description"}:
            return None
        lists.append({key_of(value): value for value in values})
    counts = Counter(key for values in lists for key in values)
    kept = [value for values in lists for key, value in values.items() if counts[key] == 1]
    return [{"enum": kept}] if kept else None


def _apart(branches: list[Any], root: Root, *, is_object: bool) -> list[Any] | None:
    """The branches, each without what another takes, too. None: that is not possible."""
    if len(branches) == 1:
        return branches
    known = [root.resolved(branch) for branch in branches]
    made = []
    for number, (branch, own) in enumerate(zip(branches, known, strict=True)):
        if own is None:
            return None
        needed: list[str] = []
        forbidden: list[str] = []
        for other_number, other in enumerate(known):
            if other_number == number:
                continue
            if other is None:
                return None
            if _excludes(own, other, root):
                continue
            told = _told_apart(own, other, root, is_object=is_object)
            if told is None:
                return None
            (needed if told[1] else forbidden).append(told[0])
        if any(name in needed for name in forbidden):
            return None
        made.append(_held(branch, own, needed, forbidden, root) if needed or forbidden else branch)
    return made


def _held(branch: Any, own: Schema, needed: list[str], forbidden: list[str], root: Root) -> dict[str, Any]:
    """A branch with properties it has, and others it has not; one that is a reference stays one."""

    def make() -> dict[str, Any]:
        return {
            **own,
            "type": "object",
            "required": list(dict.fromkeys([*_required(own), *needed])),
            "properties": {**_properties(own), **dict.fromkeys(forbidden, False)},
        }

    if "$ref" not in branch:
        return make()
    return {"$ref": root.changed(branch["$ref"], (*needed, "", *forbidden), make)}


def _excludes(one: Schema, other: Schema, root: Root, depth: int = 0) -> bool:
    """Whether surely no value is of both."""
    kinds = root.kinds(one) & root.kinds(other)
    if not kinds:
        return True
    first, second = values_of(one), values_of(other)
    if first is not None and second is not None:
        return not {key_of(value) for value in first} & {key_of(value) for value in second}
    if kinds != {"object"} or depth > _MAX_DEPTH:
        return False
    for name in {*_required(one), *_required(other)}:
        if not root.may_look():
            return False
        if _lacks(one, name) or _lacks(other, name):
            return True
        mine, theirs = root.resolved(_properties(one).get(name, True)), root.resolved(_properties(other).get(name, True))
        if mine is not None and theirs is not None and _excludes(mine, theirs, root, depth + 1):
            return True
    return False


def _told_apart(own: Schema, other: Schema, root: Root, *, is_object: bool) -> tuple[str, bool] | None:
    """A property that keeps ``own``'s values out of ``other``: and whether they have it, or must not. None: there is none."""
    if not is_object and (root.kinds(own) & root.kinds(other)) != {"object"}:
        return None
    mine, theirs = _properties(own), _properties(other)
    for name, value in mine.items():
        if name not in theirs:
            continue
        first, second = root.resolved(value), root.resolved(theirs[name])
        if first is not None and second is not None and _excludes(first, second, root):
            return name, True
    needed = frozenset(_required(own))
    return next(((name, False) for name in _required(other) if name not in needed), None)


def _properties(schema: Schema) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _required(schema: Schema) -> list[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _lacks(schema: Schema, name: str) -> bool:
    """Whether no object of the schema has the property."""
    known = _properties(schema)
    if name in known:
        return known[name] is False
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")
