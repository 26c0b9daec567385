"""Keeps control markers that clients write ("<|im_end|>") from becoming control tokens (request speed).

A chat template writes messages and its own markers into one text, where they can't be told apart any more. So markers within what
clients wrote are broken by a character that nothing else uses, before the template is rendered; afterwards the pieces between the
template's own markers that hold the character are encoded as plain text, without it:

    "a<|im_end|>b"  ─►  "a<▯|im_end|>b"  ─► template ─►  "<|im_start|>user\\n" · "a<▯|im_end|>b" · "<|im_end|>\\n"
                                                            control tokens        plain text          control tokens

The same goes for whatever else of the client's a template is given: tools, their schemas, variables. A chat without markers takes
the ordinary path, untouched. Must not know: requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from antiphon.core.errors import InvalidInput

_BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text means anything by them
# A template may look for these in what an assistant said, to leave its thoughts out.
_THOUGHT = re.compile("think|reason", re.IGNORECASE)


class ControlMarkers:
    """The markers of one tokenizer.

    Args:
        markers: texts of its special tokens.
        normalise: what the tokenizer does to a text before it looks for ``normalised``; None = it looks for none so.
        normalised: those of the markers that it finds in normalised texts, normalised.
    """

    def __init__(
        self, markers: Iterable[str], *, normalise: Callable[[str], str] | None = None, normalised: Iterable[str] = ()
    ) -> None:
        self._any = _any_of(markers)
        self._any_normal = _any_of(normalised) if normalise is not None else None
        self._normalise = normalise

    def guarded(
        self, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], str | None]:
        """Messages and variables with every marker broken, and the character that breaks them; None = there was no marker.

        Raises:
            InvalidInput: the text uses every character that could break a marker.
        """
        plain, others = [dict(message) for message in messages], dict(variables)
        pattern = self._any
        everything = (plain, others)
        if pattern is None or not any(pattern.search(text) or self._hides(text) for text in _texts(everything)):
            return plain, others, None
        used = set().union(*(set(text) for text in _texts(everything)))
        free = next((char for char in _BREAKS if char not in used), None)
        if free is None:
            raise InvalidInput("the messages hold control markers and every character that could break them", "messages")

        def broken(match: re.Match[str]) -> str:
            return match[0][0] + free + match[0][1:]

        def guard(value: Any, *, thoughts: bool) -> Any:
            if isinstance(value, str):
                text = pattern.sub(lambda match: match[0] if thoughts and _THOUGHT.search(match[0]) else broken(match), value)
                return free + text if self._hides(text) else text
            if isinstance(value, Mapping):
                return {guard(key, thoughts=thoughts): guard(item, thoughts=thoughts) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [guard(item, thoughts=thoughts) for item in value]
            return value

        guarded = [guard(message, thoughts=message.get("role") == "assistant") for message in plain]
        return guarded, {name: guard(value, thoughts=False) for name, value in others.items()}, free

    def _hides(self, text: str) -> bool:
        """Whether the tokenizer finds a marker in a text that has it in another spelling."""
        if self._any_normal is None or self._normalise is None:
            return False
        return self._any_normal.search(self._normalise(text)) is not None

    def pieces(self, text: str, breaker: str) -> list[tuple[str, bool]]:
        """A rendered text as pieces, each with whether it is plain: plain ones held broken markers, which are whole again."""
        assert self._any is not None, "without markers there is nothing to break"
        found: list[tuple[str, bool]] = []
        ordinary, start = "", 0
        for match in [*self._any.finditer(text), None]:
            end = len(text) if match is None else match.start()
            between = text[start:end]
            if breaker in between:
                if ordinary:
                    found.append((ordinary, False))
                found.append((between.replace(breaker, ""), True))
                ordinary = ""
            else:
                ordinary += between
            if match is not None:
                ordinary += match[0]
                start = match.end()
        if ordinary:
            found.append((ordinary, False))
        return found


def _any_of(markers: Iterable[str]) -> re.Pattern[str] | None:
    words = sorted({marker for marker in markers if len(marker) > 1})
    return re.compile(_pattern(words)) if words else None


def _pattern(words: Sequence[str]) -> str:
    """Any of the words, the longest first. Words share their beginnings: a thousand markers cost no more to look for than one."""
    rests: dict[str, list[str]] = {}
    for word in filter(None, words):
        rests.setdefault(word[0], []).append(word[1:])
    branches = []
    for first, ends in rests.items():
        same = takewhile(lambda both: both[0] == both[1], zip(min(ends), max(ends), strict=False))
        shared = "".join(char for char, _ in same)
        branches.append(re.escape(first + shared) + _pattern([end[len(shared) :] for end in ends]))
    if not branches:
        return ""
    either = f"(?:{'|'.join(branches)})"
    return f"{either}?" if "" in words else either


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
