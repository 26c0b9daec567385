"""What an answer is made of (values; request speed)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """Text of a thought."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Text for the reader. ``gap``: white space that parts it from the answer's text before the calls between them, where both are
    shown as one.
    """

    text: str
    gap: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBegin:
    """A call of a function begins; ``index`` counts the answer's calls. ``is_custom``: its arguments are a text, no JSON."""

    index: int
    name: str
    is_custom: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArguments:
    """A piece of a call's arguments; all of them together are JSON, where the model wrote JSON, or a custom tool's text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnd:
    """A call is whole."""

    index: int


Part = Thought | Text | CallBegin | CallArguments | CallEnd
