"""What a format of calls is made of: a machine that reads it, a writer, a grammar (request speed: once per character).

A machine is a generator that is sent one character at a time (``next_char``), so that a format reads like a recursive-descent
parser and its result can't depend on how the text was cut. Must not know: any particular format.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.custom.inputs import INPUT
from antiphon.gateway.text.custom.lark import quoted
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought
from antiphon.gateway.text.schemas.narrowing import narrowed
from antiphon.gateway.text.schemas.refs import BOOLEANS

_T = TypeVar("_T")
Steps = Generator[None, str, _T]

SPACE = " \t\r\n"
_WHITE_SPACE = "[ \\n]{0,24}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtMarkers:
    """How thoughts are written.

    ``hint``: what a chat template of them has; "" = the end marker. ``skipped``: what a prompt ends with when there shall be no
    thought; None = an empty one. ``efforts``: words for effort that the template reads, where they aren't the client's.
    """

    name: str
    start: str
    end: str
    hint: str = ""
    skipped: str | None = None
    efforts: Mapping[str, str] = field(default_factory=dict)

    def detect(self, template: str) -> bool:
        """Whether a chat template tells its model to think this way."""
        return (self.hint or self.end) in template


@dataclass(slots=True)
class Rules:
    """Lark rules while a grammar is written: a format returns expressions, what needs a name is kept here."""

    literal: Callable[[str], str]  # text to an expression; special tokens in it by id
    lines: list[str] = field(default_factory=list)

    def name(self, expression: str, attributes: str = "") -> str:
        """A rule of its own for an expression; its name."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {expression}")
        return name

    def arguments(self, tool: Tool) -> str:
        """JSON of a tool's arguments: of all that its schema says where it is strict, else of what the engine knows of it.

        Raises:
            InvalidInput: a custom tool's grammar has what can't be written as JSON.
        """
        if tool.grammar is not None:
            before, after = self.literal(f'{{"{INPUT}": "'), self.literal('"}')
            return f"{before} {lark(quoted(tool.grammar, tool.field))} {after}"
        return self.json(tool.parameters, is_strict=tool.strict)

    def json(self, schema: Mapping[str, Any] | bool, *, is_strict: bool = True, white_space: str | None = None) -> str:
        """JSON of a schema.

        White space between its parts is bounded, so that a model can't go on with it for ever; ``white_space``: a pattern of it.
        What is not ``is_strict`` is held to the words of its schema that the engine has.
        """
        known = narrowed(schema, is_strict=is_strict)
        known = known if isinstance(known, Mapping) else BOOLEANS[bool(known)]
        plain = {key: value for key, value in known.items() if key != "x-guidance"}
        guidance = {"whitespace_pattern": _WHITE_SPACE if white_space is None else white_space}
        return f"%json {json.dumps({**plain, 'x-guidance': guidance})}"

    def until(self, end: str) -> str:
        """Any text up to and with ``end``, an ordinary text."""
        return self.name("ANY", f"[suffix={json.dumps(end)}]")

    def through(self, end: str) -> str:
        """As ``until``, where ``end`` may be a special token."""
        literal = self.literal(end)
        return f"ANY {literal}" if literal.startswith("<[") else self.until(end)


class CallFormat(Protocol):
    """One way of writing calls."""

    @property
    def name(self) -> str:
        """As documents write it."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Kept in the text even where they are special tokens."""
        ...

    @property
    def opening(self) -> str | None:
        """What comes before the first call; None = the answer begins with the call."""
        ...

    def detect(self, template: str) -> bool:
        """Whether a chat template tells its model to write this way."""
        ...

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """A reader of one answer."""
        ...

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as a model of this format writes them."""
        ...

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """An expression of what follows ``opening``: one or, with ``parallel``, more calls."""
        ...


@runtime_checkable
class ChannelFormat(CallFormat, Protocol):
    """A format in which all that a model says is in messages with a header: its machine reads answers without tools, too, and its
    ``grammar`` is of the whole message.
    """

    def final(self, expression: str, rules: Rules) -> str:
        """An expression of an answer to the reader that is ``expression``."""
        ...


class EndOfText(Exception):
    """Thrown into a machine where the answer ends."""


class Malformed(Exception):
    """What was read is no call."""


class CallMachine(ABC):
    """Reads one answer; a format's ``run`` is the reading. After ``finish`` nothing may be fed."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.is_thinking = False  # inside a thought that the machine itself reads
        self._parts: list[Part] = []
        self._back: list[str] = []  # read too far: given again, last first
        self._tape: list[str] | None = None
        self._num_calls = 0
        self._is_in_call = False
        self._opened: str | None = None  # a marker that no call has followed yet
        self._steps = self.run()
        next(self._steps)

    @abstractmethod
    def run(self) -> Steps[None]:
        """The reading; never returns."""

    def feed(self, text: str) -> list[Part]:
        """What has become certain with ``text``."""
        for char in text:
            self._steps.send(char)
        return self._take()

    def finish(self, *, truncated: bool) -> list[Part]:
        """The answer has ended. A marker without its call is text, unless the answer was cut there."""
        with contextlib.suppress(EndOfText, StopIteration):
            self._steps.throw(EndOfText())
        if self._opened is not None and not truncated:
            self._parts.append(Text(text=self._opened + "".join(self._tape or ())))
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # ---- what formats are written with -----------------------------------------------------------------------------

    def next_char(self) -> Steps[str]:
        """The next character."""
        char = self._back.pop() if self._back else (yield)
        if self._tape is not None:
            self._tape.append(char)
        return char

    def put_back(self, text: str) -> None:
        """Give ``text`` again; the tape forgets it."""
        self._back.extend(reversed(text))
        if self._tape is not None:
            del self._tape[len(self._tape) - len(text) :]

    def skip_space(self) -> Steps[str]:
        """The next character that is no white space."""
        while True:
            char = yield from self.next_char()
            if char not in SPACE:
                return char

    def until(self, markers: Sequence[str], give: Callable[[str], None]) -> Steps[str]:
        """Give text on up to one of ``markers``; which."""
        held = ""
        try:
            while True:
                held += yield from self.next_char()
                while held:
                    if held in markers:
                        return held
                    if any(marker.startswith(held) for marker in markers):
                        break
                    give(held[0])
                    held = held[1:]
        except EndOfText:
            if held:
                give(held)
            raise

    def expect(self, text: str) -> Steps[None]:
        """Read exactly ``text``. Raises Malformed."""
        for wanted in text:
            if (yield from self.next_char()) != wanted:
                raise Malformed

    def may_follow(self, text: str, *, skipping: str = SPACE) -> Steps[bool]:
        """Read ``text`` where it comes next, after what is skipped or nothing; what is something else is given again."""
        read = ""
        while True:
            char = yield from self.next_char()
            read += char
            if not text.startswith(read.lstrip(skipping)):
                self.put_back(read)
                return False
            if read.lstrip(skipping) == text:
                return True

    def text(self, text: str) -> None:
        """Text for the reader."""
        self._parts.append(Text(text=text))

    def thought(self, text: str) -> None:
        """Text of a thought, where a format writes thoughts among calls."""
        self._parts.append(Thought(text=text))

    @property
    def is_in_call(self) -> bool:
        """True between a call's beginning and its end."""
        return self._is_in_call

    @property
    def is_after_call(self) -> bool:
        """True where no marker waits for a call."""
        return self._opened is None

    def opened(self, marker: str) -> None:
        """A marker was read; from here on the tape runs."""
        self._opened, self._tape = marker, []

    def not_a_call(self) -> None:
        """What followed the marker was no call: the marker is text, what follows is read again."""
        tape, self._tape = "".join(self._tape or ()), None
        self.text(self._opened or "")
        self._opened = None
        self._back.extend(reversed(tape))

    def was_empty(self) -> None:
        """Calls were announced and closed again without any: the markers say nothing."""
        self._opened, self._tape = None, None

    def begin(self, name: str) -> None:
        """A call begins."""
        self._is_in_call, self._opened, self._tape = True, None, None
        self._parts.append(CallBegin(index=self._num_calls, name=name))

    def arguments(self, text: str) -> None:
        """A piece of its arguments."""
        self._parts.append(CallArguments(index=self._num_calls, text=text))

    def end(self) -> None:
        """The call is whole."""
        self._parts.append(CallEnd(index=self._num_calls))
        self._is_in_call = False
        self._num_calls += 1


def lark(grammar: str) -> str:
    """An expression of a whole grammar."""
    return f"%lark {{\n{grammar}\n}}"


def example_arguments(call: ToolCall) -> Any:
    """A call's arguments as a value; what isn't JSON stays text."""
    try:
        return read_json_text(call.arguments) if call.arguments else {}
    except ValueError:
        return call.arguments


def one_or_more(call: str, between: str, *, parallel: bool) -> str:
    """One call, or several with ``between`` them."""
    return f"{call} ({between} {call})*" if parallel else call
