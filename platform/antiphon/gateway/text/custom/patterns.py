"""A regular expression of texts to one of the texts as JSON writes them between quotes (request speed; pure).

The syntax is that of Rust's ``regex``. A class keeps its characters but those that JSON escapes, beside which stand their escapes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Final

_SPECIAL: Final = (*map(chr, range(32)), '"', "\\")  # what JSON escapes
_PLAIN: Final = r'[^"\\\x00-\x1f]'
_SINGLE: Final[Mapping[str, str]] = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}
_CODE: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|[xuU]\{([0-9A-Fa-f]{1,8})\})")
_PROPERTY: Final = re.compile(r"\\([pP])(?:\{(\^?)([A-Za-z]{1,2})\}|([A-Za-z]))")
_GROUP: Final = re.compile(r"\(\?(?:P?<\w+>|([a-zA-Z-]*)([:)]))")


def quoted_text(text: str) -> str:
    """A text as it stands between JSON's quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def quoted_pattern(pattern: str) -> str:
    """The pattern.

    Raises:
        ValueError: it has a part that can't be written so.
    """
    made, at, flags = "", 0, [""]
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            piece, written = _escaped(pattern, at)
        elif char == "[":
            piece = pattern[at : _end_of_class(pattern, at)]
            written = _class(piece, flags[-1])
        elif char == ".":
            piece, written = char, _class(r"[\x00-\x{10ffff}]" if "s" in flags[-1] else r"[^\n]", flags[-1])
        elif char == "(":
            piece = written = _group(pattern, at, flags)
        elif char == ")":
            piece = written = char
            if len(flags) > 1:
                flags.pop()
        else:
            piece, written = char, _character(char) if char in _SPECIAL else char
        made += written
        at += len(piece)
    return made


def _group(pattern: str, at: int, flags: list[str]) -> str:
    """What opens a group, or sets flags within one."""
    found = _GROUP.match(pattern, at)
    if found is None:
        flags.append(flags[-1])
        return "("
    changed = _changed(flags[-1], found[1] or "")
    if found[2] == ")":
        flags[-1] = changed
    else:
        flags.append(changed)
    return found[0]


def _changed(flags: str, by: str) -> str:
    on, _, off = by.partition("-")
    if "x" in on:
        raise ValueError("patterns with white space of their own (x) can't be used where calls are JSON")
    return "".join(flag for flag in dict.fromkeys(flags + on) if flag not in off)


def _escaped(pattern: str, at: int) -> tuple[str, str]:
    """What a backslash begins, and how it is written."""
    code = _CODE.match(pattern, at)
    if code is not None:
        value = int(next(digits for digits in code.groups() if digits), 16)
        char = chr(value) if value <= 0x10FFFF else ""
        return code[0], _character(char) if char in _SPECIAL else code[0]
    known = _PROPERTY.match(pattern, at)
    if known is not None:
        return known[0], _class(f"[{known[0]}]", "")
    piece = pattern[at : at + 2]
    if len(piece) < 2:
        raise ValueError("a pattern ends in a backslash")
    if piece[1] in "dDwWsS":
        return piece, _class(f"[{piece}]", "")
    char = _SINGLE.get(piece[1], piece[1])
    return piece, _character(char) if char in _SPECIAL else piece


def _character(char: str) -> str:
    """A character that JSON escapes; in no letters but these, whatever the case."""
    written = re.sub("([^0-9A-Za-z])", r"\\\1", quoted_text(char))
    return f"(?-i:{written})"


def _class(piece: str, flags: str) -> str:
    found = [char for char in _SPECIAL if _members(piece, flags).match(char)]
    if not found:
        return piece
    return "(?:" + "|".join([f"[{piece}&&{_PLAIN}]", *map(_character, found)]) + ")"


def _members(piece: str, flags: str) -> re.Pattern[str]:
    """A class, for the characters that JSON escapes alone. Raises ValueError: it is made of others."""
    inner = re.sub(r"\\.", "", piece[1:-1].removeprefix("^").removeprefix("]"), flags=re.DOTALL)
    if "[" in inner or any(mark in inner for mark in ("&&", "--", "~~")):
        raise ValueError(f"{piece}: classes made of classes can't be used where calls are JSON")
    known = _PROPERTY.sub(lambda found: "".join(f"\\x{ord(char):02x}" for char in _SPECIAL if _has(found, char)) or "a", piece)
    if re.search(r"(?<!\\)(?:\\\\)*\\[pP]", known):
        raise ValueError(f"{piece}: of properties there are general categories, as \\p{{L}} or \\p{{Nd}}")
    known = _CODE.sub(lambda found: _as_python(int(next(digits for digits in found.groups() if digits), 16)), known)
    try:
        return re.compile(known, re.ASCII | (re.IGNORECASE if "i" in flags else 0))
    except re.error as error:
        raise ValueError(f"{piece}: {error}") from None


def _has(found: re.Match[str], char: str) -> bool:
    """Whether a property has a character."""
    is_not = (found[1] == "P") != bool(found[2])
    return is_not != unicodedata.category(char).startswith(found[3] or found[4])


def _as_python(code: int) -> str:
    if code > 0x10FFFF:
        raise ValueError("there is no such character")
    return f"\\U{code:08x}"


def _end_of_class(pattern: str, start: int) -> int:
    """Behind the bracket that closes the class at ``start``. Raises ValueError: none does."""
    at = start + 1 + pattern.startswith("^", start + 1)
    at += pattern.startswith("]", at)
    depth = 1
    while at < len(pattern):
        match pattern[at]:
            case "\\":
                at += 1
            case "[":
                depth += 1
            case "]":
                depth -= 1
                if not depth:
                    return at + 1
        at += 1
    raise ValueError("a class is not closed")
