"""Calls that are JSON objects, read as they come (request speed: once per character).

The name is given out as soon as it is known and the arguments verbatim, in whatever order they are written, but for what JSON's
texts have no place for: a line end is escaped, and a backslash that escapes nothing is one of the text. Must not know: what
surrounds the object in any format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import SPACE, CallMachine, Malformed, Rules, Steps, example_arguments
from antiphon.gateway.text.parts import Part

_ARGUMENT_KEYS = ("arguments", "parameters")
_ESCAPES = '"\\/bfnrtu'
# Python's words, and numbers that JSON has not.
_HALVES = re.compile("[\ud800-\udfff]")  # of characters, by themselves: no answer can hold them
_BEGIN_WORDS, _MAX_WORD = "TFNI-", 16
_WORDS = {"True": "true", "False": "false", "None": "null", "NaN": "null", "Infinity": "null", "-Infinity": "null"}


class JsonCallMachine(CallMachine):
    """Helps machines of formats whose calls are, or hold, JSON."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.has_arguments = False  # the call's arguments are whole
        super().__init__(tools)

    def begin(self, name: str) -> None:
        """See ``CallMachine``."""
        self.has_arguments = False
        super().begin(name)

    def finish(self, *, truncated: bool) -> list[Part]:
        """See ``CallMachine``. An answer that ended by itself after a call's arguments has left out but the last brace."""
        parts = super().finish(truncated=truncated)
        if self.is_in_call and self.has_arguments and not truncated:
            self.end()
            parts += self._take()
        return parts

    def broken(self, *closing: str) -> Steps[None]:
        """A call that has begun goes on as no JSON does: all up to what closes it is arguments, unless it has them."""
        if not self.has_arguments:
            yield from self.until(closing, self.arguments)
        self.end()

    def accepts(self, name: str) -> bool:
        """Whether an object with this name is a call."""
        return bool(name)

    def json_call(self) -> Steps[None]:
        """One object with a name and arguments, from its brace on. Raises Malformed before the call has begun."""
        if (yield from self.skip_space()) != "{":
            raise Malformed
        name: str | None = None
        early = ""  # arguments that came before the name
        has_arguments = False
        while True:
            char = yield from self.skip_space()
            if char == "}":
                break
            if char == ",":
                continue
            if char != '"':
                self.put_back(char)
                raise Malformed
            key = yield from self._string(char)
            if (yield from self.skip_space()) != ":":
                raise Malformed
            first = yield from self.skip_space()
            value: list[str] = []
            if key == "name" and name is None:
                yield from self.json_value(first, value.append)
                name = _text_of("".join(value))
                if name is None or not self.accepts(name):
                    raise Malformed
                self.begin(name)
                if early:
                    self.arguments(early)
                    self.has_arguments = True
            elif key in _ARGUMENT_KEYS and not has_arguments:
                has_arguments = True
                if name is None or first not in "{[":
                    yield from self.json_value(first, value.append)
                    whole = _unquoted("".join(value))
                    if name is None:
                        early = whole
                    else:
                        self.arguments(whole)
                else:
                    yield from self.json_value(first, self.arguments)
                self.has_arguments = name is not None
            else:
                yield from self.json_value(first, value.append)
        if name is None:
            raise Malformed
        if not has_arguments:
            self.arguments("{}")
        self.end()

    def json_value(self, first: str, give: Callable[[str], None]) -> Steps[None]:
        """One JSON value whose first character was read; what ends a number is given again."""
        give(first)
        if first == '"':
            yield from self._rest_of_string(give)
            return
        if first not in "{[":
            while True:
                char = yield from self.next_char()
                if char in ",}]" or char in SPACE:
                    self.put_back(char)
                    return
                give(char)
        depth = 1
        while depth:
            char = yield from self.next_char()
            if char in _BEGIN_WORDS:
                yield from self._word(char, give)
                continue
            give(char)
            if char == '"':
                yield from self._rest_of_string(give)
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1

    def _word(self, first: str, give: Callable[[str], None]) -> Steps[None]:
        """A word outside of texts, as JSON writes it. What an answer ends in is given as far as it came."""
        word = first
        try:
            while (char := (yield from self.next_char())).isalpha():
                word += char
                if len(word) > _MAX_WORD:
                    break
            else:
                self.put_back(char)
        finally:
            give(_WORDS.get(word, word))

    def _rest_of_string(self, give: Callable[[str], None]) -> Steps[None]:
        while True:
            char = yield from self.next_char()
            if char == "\\":
                escaped = yield from self.next_char()
                if escaped in _ESCAPES:
                    give(char + escaped)
                elif escaped == "'":
                    give(escaped)
                else:
                    give("\\\\")
                    self.put_back(escaped)
                continue
            give(json.dumps(char)[1:-1] if char < " " else char)
            if char == '"':
                return

    def _string(self, first: str) -> Steps[str]:
        read: list[str] = []
        yield from self.json_value(first, read.append)
        text = _text_of("".join(read))
        if text is None:
            raise Malformed
        return text


def call_object(tool: Tool, rules: Rules, *, key: str = "arguments") -> str:
    """An expression of a call as an object."""
    before = rules.literal('"name": ' + json.dumps(tool.name) + ', "' + key + '": ')
    # The brace by itself: an answer's shape may begin with one, too, and a lexeme that has begun is not left for a shorter one.
    return f"{rules.literal('{')} {before} {rules.arguments(tool)} {rules.literal('}')}"


def written(call: ToolCall, *, key: str = "arguments") -> str:
    """A call as an object."""
    return json.dumps({"name": call.name, key: example_arguments(call)}, ensure_ascii=False)


def any_of(expressions: Sequence[str]) -> str:
    """One of several expressions."""
    return "(" + " | ".join(f"({expression})" for expression in expressions) + ")"


def _text_of(raw: str) -> str | None:
    try:
        value = read_json_text(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) and not _HALVES.search(value) else None


def _unquoted(raw: str) -> str:
    """Arguments that were written as a string of JSON, without the quotes; where nothing was written, an empty object."""
    if raw == "null":
        return "{}"
    inner = _text_of(raw) if raw.startswith('"') else None
    if inner is None:
        return raw
    if not inner.strip():
        return "{}"
    try:
        return inner if isinstance(read_json_text(inner), Mapping) else raw
    except ValueError:
        return raw
