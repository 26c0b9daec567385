"""YAML text as plain values with the lines they stand on; refuses what JSON could not hold (control speed).

Documents are read by Kubernetes too, so they stay within what both understand the same way: string keys, no key twice, no
tags, no infinite structures. Dates stay text.

Must not know: any kind of document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from antiphon.core.errors import Problem, SpecInvalid

MAX_TEXT_BYTES = 4 * 2**20  # well above what an API server stores
_MAX_DEPTH = 64
_MAX_VALUES = 200_000  # counts what aliases repeat, so that a few lines can't unfold into a whole memory

Value = dict[str, "Value"] | list["Value"] | str | int | float | bool | None


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlDocument:
    """One document of a text: its value, and where its parts stand."""

    value: Value
    root: yaml.Node

    def line(self, path: Sequence[str | int]) -> int:
        """The line, from 1, of the value at ``path``, or of its nearest ancestor that is there."""
        node, line = self.root, self.root.start_mark.line
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            node, line = found
        return int(line) + 1


def load_yaml(text: str | bytes, source: str) -> list[YamlDocument]:
    """Read a text with any number of documents; empty ones are left out.

    Raises:
        SpecInvalid: the text is not YAML of the kind described above; each problem says its line.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise _invalid(source, None, f"the text is longer than {MAX_TEXT_BYTES} bytes")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(source, None, f"the text is not UTF-8: byte {error.start}") from error
    found, problems = [], []
    try:
        loader = _Loader(decoded)
        while loader.check_node():
            root = loader.get_node()
            assert root is not None  # check_node said so
            reader = _Reader(loader, source)
            value = reader.value(root, (), 0)
            problems += reader.problems
            if value is not None:
                found.append(YamlDocument(value=value, root=root))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise _invalid(source, None if mark is None else mark.line + 1, f"{where}not YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise _invalid(source, None, f"not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise _invalid(source, None, "nested too deeply") from error
    if problems:
        raise SpecInvalid(problems)
    return found


def path_text(path: Sequence[str | int]) -> str:
    """A path as people write it: spec.pools[1].replicas; keys that are no plain words stand in quotes."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part[:80]!r}]"
    return text


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self._loader = loader
        self._source = source
        self._num_values = 0
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, path: tuple[str | int, ...], depth: int) -> Value:
        self._num_values += 1
        if depth > _MAX_DEPTH or self._num_values > _MAX_VALUES:
            raise RecursionError
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            try:
                scalar: Value = self._loader.construct_object(node)
            except (ValueError, KeyError, IndexError, OverflowError, yaml.constructor.ConstructorError):
                self._problem(node, path, f"{node.value[:60]!r} is not a {node.tag.rpartition(':')[2]}")
                return None
            return scalar
        self._problem(node, path, f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')!r} is not allowed")
        return None

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...], depth: int) -> Value:
        lines: dict[str, int] = {}
        found: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = repr(key_node.value[:60]) if isinstance(key_node, yaml.ScalarNode) else "this key"
                self._problem(key_node, path, f"{shown} is not a string: put keys in quotes")
                continue
            key = str(key_node.value)
            if key in lines:
                self._problem(key_node, (*path, key), f"the key is there already, in line {lines[key]}")
                continue
            lines[key] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, (*path, key), depth + 1)
        return found

    def _problem(self, node: yaml.Node, path: tuple[str | int, ...], message: str) -> None:
        line = node.start_mark.line + 1
        shown = path_text(path) or "document"
        self.problems.append(Problem(path=shown, message=f"line {line}: {message}", source=self._source, line=line))


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return value, key.start_mark.line
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item, item.start_mark.line
    return None


def _invalid(source: str, line: int | None, message: str) -> SpecInvalid:
    return SpecInvalid([Problem(path="document", message=message, source=source, line=line)])
