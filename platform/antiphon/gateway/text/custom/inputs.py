"""Custom tools: a call is a text, which models write as the one argument of a function (request speed; once per character).

    tool_of_text ─► asked like any function          model's arguments ─► InputReader ─► the text

Must not know: doors, formats of calls, or grammars' syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Final, Literal

from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.text.chat_options import Tool

INPUT: Final = "input"
_BEGINNING: Final = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAX_BEGINNING: Final = 256  # characters; what begins otherwise is read once it is whole
_PLAIN: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LOST: Final = "\ufffd"  # for half of a character


def tool_of_text(
    name: str, description: str | None, *, field: str, syntax: Literal["lark", "regex"] | None = None, definition: str = ""
) -> Tool:
    """A tool that is called with a text; with ``syntax`` the text follows ``definition``."""
    told, grammar = "The whole input, as one text.", None
    if syntax == "lark":
        told, grammar = f"{told} It follows this grammar of Lark's:\n{definition}", definition
    elif syntax == "regex":
        pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", definition).replace("\n", "\\n")
        told, grammar = f"{told} It matches this regular expression:\n{definition}", f"start: /{pattern}/"
    parameters = {
        "type": "object",
        "properties": {INPUT: {"type": "string", "description": told}},
        "required": [INPUT],
        "additionalProperties": False,
    }
    return Tool(
        name=name,
        description=description,
        parameters=parameters,
        strict=grammar is not None,
        is_custom=True,
        grammar=grammar,
        field=field,
    )


def as_arguments(text: str) -> str:
    """A call's text as the arguments of a function."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


class InputReader:
    """One call's arguments, as they come, to the text they hold; what comes out is a function of all that went in.

    A model that isn't held to the one argument may write others: then the text is known when they are whole.
    """

    def __init__(self) -> None:
        self._held: str | None = ""  # the beginning, until it is known; None = within the text, or behind it
        self._steps = _characters()
        next(self._steps)

    def feed(self, arguments: str) -> str:
        """More of the text, as far as it is certain."""
        if self._held is None:
            return self._read(arguments)
        self._held += arguments
        if len(self._held) - len(arguments) > _MAX_BEGINNING:
            return ""
        begun = _BEGINNING.match(self._held)
        if begun is None:
            return ""
        rest, self._held = self._held[begun.end() :], None
        return self._read(rest)

    def finish(self) -> str:
        """The call has ended: the rest of the text."""
        return _text_of(self._held) if self._held else ""

    def _read(self, text: str) -> str:
        given = ""
        for char in text:
            given += self._steps.send(char)
        return given


def _characters() -> Generator[str, str, None]:
    """Sent the characters of a JSON text from behind its quote on, gives what they stand for; behind its end, nothing."""
    given, high = "", 0  # the first half of a character
    while True:
        char = yield given
        given = ""
        if char == '"':
            break
        if char != "\\":
            given, high = (_LOST if high else "") + char, 0
            continue
        char = yield ""
        if char != "u":
            given, high = (_LOST if high else "") + _PLAIN.get(char, char), 0
            continue
        digits = ""
        while len(digits) < 4:
            digits += yield ""
        code = int(digits, 16) if re.fullmatch("[0-9A-Fa-f]{4}", digits) else 0xFFFD
        if high and 0xDC00 <= code < 0xE000:
            given, high = chr(0x10000 + ((high - 0xD800) << 10) + code - 0xDC00), 0
        elif 0xD800 <= code < 0xDC00:
            given, high = _LOST if high else "", code
        else:
            given, high = (_LOST if high else "") + (_LOST if 0xDC00 <= code < 0xE000 else chr(code)), 0
    given = _LOST if high else ""
    while True:
        yield given
        given = ""


def _text_of(arguments: str) -> str:
    """The text of arguments that aren't as they should be: of one that is one, else all that was written."""
    try:
        value = read_json_text(arguments)
    except ValueError:
        return arguments
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return arguments
    found = value.get(INPUT, next(iter(value.values()), "") if len(value) < 2 else None)
    return found if isinstance(found, str) else arguments
