"""Which manager owns which field: the sets behind server-side apply (control speed, pure).

A path is a tuple of steps as Kubernetes writes them in fieldsV1: "f:spec", and 'k:{"name":"a"}' for an item of a list that
is a map. All other lists are atomic. Must not know: objects' kinds beyond which lists are maps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from antiphon_operator.testing.json_values import copied

Path = tuple[str, ...]
_MISSING = object()
ITEM = "."  # last step of the path that says a list item exists

# Lists that are maps, by the names on the way to them, and their key.
MAP_LISTS: Mapping[tuple[str, ...], str] = {
    ("metadata", "ownerReferences"): "uid",
    ("status", "conditions"): "type",
    ("status", "pools"): "name",
    ("spec", "pools"): "name",
    ("spec", "experts"): "name",
    ("spec", "template", "spec", "containers"): "name",
    ("spec", "template", "spec", "volumes"): "name",
}


def leaves(value: Any, path: Path = (), names: tuple[str, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """Every field with its value; a list item that is a map entry also yields its own path, ending in ITEM."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, f"f:{key}"), (*names, key))
    elif isinstance(value, list) and names in MAP_LISTS:
        key = MAP_LISTS[names]
        for item in value:
            step = "k:" + json.dumps({key: item[key]}, separators=(",", ":"))
            yield (*path, step, ITEM), _MISSING
            yield from leaves(item, (*path, step), (*names, "[]"))
    else:
        yield path, value


def read(value: Any, path: Path) -> Any:
    """The value at ``path``, or the marker ``_MISSING`` which equals only itself."""
    for step in path:
        if step == ITEM:
            return _MISSING
        if step.startswith("f:"):
            if not isinstance(value, dict) or step[2:] not in value:
                return _MISSING
            value = value[step[2:]]
        else:
            item = _item(value, step)
            if item is None:
                return _MISSING
            value = item
    return value


def exists(value: Any, path: Path) -> bool:
    """True when there is a value at ``path``."""
    return read(value, path) is not _MISSING


def write(value: dict[str, Any], path: Path, new: Any) -> None:
    """Set the value at ``path``, making what is missing on the way."""
    node: Any = value
    for index, step in enumerate(path):
        if step == ITEM:
            return
        last = index == len(path) - 1
        if step.startswith("f:"):
            name = step[2:]
            if last:
                node[name] = copied(new)
                return
            below: Any = [] if path[index + 1].startswith("k:") else {}
            if not isinstance(node.get(name), type(below)):
                node[name] = below
            node = node[name]
        else:
            item = _item(node, step)
            if item is None:
                item = dict(json.loads(step[2:]))
                node.append(item)
            node = item


def remove(value: dict[str, Any], path: Path) -> None:
    """Remove the value at ``path``; with ITEM, the whole list item."""
    target, parent = path[-1], path[:-1]
    if target == ITEM:
        target, parent = path[-2], path[:-2]
    node = read(value, parent)
    if target.startswith("f:"):
        if isinstance(node, dict):
            node.pop(target[2:], None)
    elif isinstance(node, list):
        item = _item(node, target)
        if item is not None:
            node.remove(item)


def to_fields_v1(paths: frozenset[Path]) -> dict[str, Any]:
    """The set as Kubernetes writes it."""
    out: dict[str, Any] = {}
    for path in sorted(paths):
        node = out
        for step in path:
            node = node.setdefault(step, {})
    return out


def _item(items: Any, step: str) -> dict[str, Any] | None:
    key, wanted = next(iter(json.loads(step[2:]).items()))
    if not isinstance(items, list):
        return None
    return next((item for item in items if item.get(key) == wanted), None)
