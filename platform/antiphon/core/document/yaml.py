"""YAML text as plain values with the lines they stand on; refuses what JSON could not hold (control speed).

Documents are read by Kubernetes too, so they stay within what both understand the same way: string keys, no key twice, no
tags, no merge keys, no infinite structures. A plain word is a number, a boolean or null where Kubernetes' reader takes it for one
(``y`` and ``1e3`` are, ``1:30`` and ``=`` are not); dates stay text.

Must not know: any kind of document.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from antiphon.core.errors import Problem, SpecInvalid

MAX_TEXT_BYTES = 4 * 2**20  # well above what an API server stores
_MAX_DEPTH = 64
_MAX_VALUES = 200_000  # counts what aliases repeat, so that a few lines can't unfold into a whole memory

Value = dict[str, "Value"] | list["Value"] | str | int | float | bool | None


_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}
_MERGE = f"{_TAG}merge"

# What sigs.k8s.io/yaml makes of plain words; it takes sexagesimal numbers (YAML 1.1) for text.
_WORDS: dict[str, Value] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_INT = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_KINDS = ((bool, "bool"), (int, "int"), (float, "float"), (str, "str"))


def plain_value(text: str) -> Value:
    """What a plain word stands for.

    Raises:
        ValueError: an integer of more digits than anybody reads.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    digits = text if text[0] == "." else text.replace("_", "")
    if _INT.fullmatch(digits) is not None:
        sign, magnitude = (-1, digits[1:]) if digits[0] == "-" else (1, digits.lstrip("+"))
        is_old_octal = len(magnitude) > 1 and magnitude[0] == "0" and magnitude[1].isdigit()
        return sign * (int(magnitude, 8) if is_old_octal else int(magnitude, 0))
    if _FLOAT.fullmatch(digits) is not None and math.isfinite(float(digits)):
        return float(digits)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain words are those of Kubernetes."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool | None) -> str:
        """The tag of a node that has none."""
        if kind is not yaml.ScalarNode:
            return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]
        text = "" if value is None else value
        if not (isinstance(implicit, tuple) and implicit[0]):
            return f"{_TAG}str"  # it stands in quotes
        if text == "<<":
            return _MERGE
        try:
            found = plain_value(text)
        except ValueError:
            return f"{_TAG}int"
        return _TAG + next((name for kind, name in _KINDS if isinstance(found, kind)), "null")


def _scalar(node: yaml.ScalarNode) -> Value:
    """The value of a scalar whose tag is known.

    Raises:
        ValueError: its text is not of that kind.
    """
    name = node.tag.removeprefix(_TAG)
    if name == "str":
        return _whole(node.value)
    found = plain_value(node.value)
    if name == "float" and isinstance(found, int) and not isinstance(found, bool):
        return float(found)
    if name != next((kind for type_, kind in _KINDS if isinstance(found, type_)), "null"):
        raise ValueError(name)
    return found


def _whole(text: str) -> str:
    """Text whose characters beyond U+FFFF may stand as JSON writes them, in two halves.

    Raises:
        ValueError: one half is missing.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlDocument:
    """One document of a text: its value, and where its parts stand."""

    value: Value
    root: yaml.Node

    def has(self, path: Sequence[str | int]) -> bool:
        """Whether there is a value at ``path``."""
        node = self.root
        for part in path:
            found = _child(node, part)
            if found is None:
                return False
            node = found[0]
        return True

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
            reader = _Reader(source)
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
    def __init__(self, source: str) -> None:
        self._source = source
        self._num_values = 0
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, path: tuple[str | int, ...], depth: int) -> Value:
        self._num_values += 1
        if depth > _MAX_DEPTH or self._num_values > _MAX_VALUES:
            raise RecursionError
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            try:
                return _scalar(node)
            except (ValueError, OverflowError):
                self._problem(node, path, f"{node.value[:60]!r} is not a {node.tag.removeprefix(_TAG)}")
                return None
        if isinstance(node, yaml.ScalarNode) and node.tag == _MERGE:
            return str(node.value)
        self._problem(node, path, f"the tag {node.tag.removeprefix(_TAG)!r} is not allowed")
        return None

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...], depth: int) -> Value:
        lines: dict[str, int] = {}
        found: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                self._problem(key_node, path, "merge keys (<<) are not taken: write the fields out here")
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                shown = repr(key_node.value[:60]) if isinstance(key_node, yaml.ScalarNode) else "this key"
                self._problem(key_node, path, f"{shown} is not a string: put keys in quotes")
                continue
            try:
                key = _whole(key_node.value)
            except ValueError:
                self._problem(key_node, path, f"{key_node.value[:60]!r} is no text: it holds half of a character")
                continue
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
