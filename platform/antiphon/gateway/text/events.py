"""One answer's text to what it means: thought, text, calls (request speed: once per character).

    text pieces ─► thoughts apart ─► calls apart ─► Thought, Text, CallBegin, CallArguments ..., CallEnd

Every door writes these and nothing else. The events are a function of the text alone, never of how it was cut: each machine takes
one character at a time and gives out what is certain. Must not know: doors, tokens, or who generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from antiphon.gateway.text.custom.inputs import InputReader
from antiphon.gateway.text.formats.base import CallMachine, ThoughtMarkers
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought

_APART: Final = "\n"  # where nothing stood around the calls


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserSpec:
    """How one answer is read. ``is_open``: the prompt ends inside a thought; ``may_think``: the answer may begin with one;
    ``custom``: names of tools whose calls are a text.
    """

    thoughts: ThoughtMarkers | None = None
    is_open: bool = False
    may_think: bool = True
    calls: CallMachine | None = None
    custom: frozenset[str] = frozenset()


class EventParser:
    """Reads one answer. After ``finish`` nothing may be fed."""

    def __init__(self, spec: ParserSpec) -> None:
        self._markers = spec.thoughts if spec.is_open or spec.may_think else None
        self._calls = spec.calls
        self._custom = spec.custom
        self._input: InputReader | None = None  # of a call that is a text
        self._is_thinking = spec.is_open and self._markers is not None
        self._is_beginning = self._markers is not None and not self._is_thinking
        self._held = ""  # what may yet be a marker
        self._thought = _Edges()
        self._answer = _Edges(after_thought=self._is_thinking)

    @property
    def is_thinking(self) -> bool:
        """True inside a thought."""
        return self._is_thinking or (self._calls is not None and self._calls.is_thinking)

    def feed(self, text: str) -> tuple[Part, ...]:
        """What has become certain with ``text``."""
        parts: list[Part] = []
        if not (self._is_thinking or self._is_beginning):
            self._read(text, parts)
            return merged(parts)
        for position, char in enumerate(text):
            if self._is_beginning:
                self._begin(char, parts)
            elif self._is_thinking:
                self._think(char, parts)
            else:
                self._read(text[position:], parts)
                break
        return merged(parts)

    def finish(self, *, truncated: bool) -> tuple[Part, ...]:
        """The answer has ended; ``truncated``: not by its own will."""
        parts: list[Part] = []
        held, self._held = self._held, ""
        if self._is_thinking:
            self._thought.take(held, parts, Thought)
        else:
            self._read(held, parts)
        if self._calls is not None:
            self._split(self._calls.finish(truncated=truncated), parts)
        self._answer.flush(parts)
        return merged(parts)

    def _begin(self, char: str, parts: list[Part]) -> None:
        assert self._markers is not None
        self._held += char
        begun = self._held.lstrip()
        if begun.startswith(self._markers.start):
            self._is_beginning, self._is_thinking, self._held = False, True, ""
            self._answer.after_thought = True
        elif not self._markers.start.startswith(begun):
            held, self._held, self._is_beginning = self._held, "", False
            self._read(held, parts)

    def _think(self, char: str, parts: list[Part]) -> None:
        assert self._markers is not None
        self._held += char
        end = self._markers.end
        if self._held == end:
            self._is_thinking, self._held = False, ""
            return
        given = ""
        while not end.startswith(self._held):
            given, self._held = given + self._held[0], self._held[1:]
        self._thought.take(given, parts, Thought)

    def _read(self, text: str, parts: list[Part]) -> None:
        if not text:
            return
        if self._calls is None:
            self._answer.take(text, parts, Text)
        else:
            self._split(self._calls.feed(text), parts)

    def _split(self, read: Sequence[Part], parts: list[Part]) -> None:
        for part in read:
            if isinstance(part, Text):
                self._answer.take(part.text, parts, Text)
                continue
            if isinstance(part, CallBegin):
                self._answer.drop()
                is_custom = part.name in self._custom
                self._input = InputReader() if is_custom else None
                parts.append(replace(part, is_custom=True) if is_custom else part)
                continue
            if self._input is not None and isinstance(part, CallArguments | CallEnd):
                text = self._input.finish() if isinstance(part, CallEnd) else self._input.feed(part.text)
                if text:
                    parts.append(CallArguments(index=part.index, text=text))
                if isinstance(part, CallArguments):
                    continue
            parts.append(part)


class _Edges:
    """Holds white space at the edges back: after a thought's markers, and around calls, it says nothing."""

    def __init__(self, *, after_thought: bool = True) -> None:
        self.after_thought = after_thought
        self._held = ""
        self._has_calls = False
        self._has_text = False
        self._has_said = False  # before the calls, too
        self._gap = ""  # the first white space around them

    def take(self, text: str, parts: list[Part], kind: type[Text] | type[Thought]) -> None:
        text = self._held + text
        self._held = ""
        if not self._has_text and (self.after_thought or self._has_calls):
            bare = text.lstrip()
            if not bare:
                self._held = text  # it may go on
                return
            self._gap = self._gap or text[: len(text) - len(bare)]
            text = bare
        body = text.rstrip()
        self._held = text[len(body) :]
        if not body:
            return
        is_apart = kind is Text and self._has_said and not self._has_text
        parts.append(Text(text=body, gap=self._gap or _APART) if is_apart else kind(text=body))
        self._has_text = self._has_said = True

    def drop(self) -> None:
        """A call begins: what is held says nothing, but where more text comes."""
        self._gap = self._held if self._has_text else self._gap or self._held
        self._held, self._has_text, self._has_calls = "", False, True

    def flush(self, parts: list[Part]) -> None:
        """The end of the answer: trailing white space is text, unless calls came before it."""
        if self._held and not self._has_calls and not (self.after_thought and not self._has_text):
            parts.append(Text(text=self._held))
        self._held = ""


def merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbours of one kind as one."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Text) and isinstance(last, Text):
            result[-1] = Text(text=last.text + part.gap + part.text, gap=last.gap)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            result[-1] = Thought(text=last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            result[-1] = CallArguments(index=last.index, text=last.text + part.text)
        else:
            result.append(part)
    return tuple(result)


__all__ = ["CallArguments", "CallBegin", "CallEnd", "EventParser", "ParserSpec", "Part", "Text", "Thought", "merged"]
