"""Keeps control markers that clients write ("<|im_end|>") from becoming control tokens (request speed).

A chat template writes messages and its own markers into one text, where they can't be told apart any more. So markers within what
clients wrote are broken by a character that nothing else uses, before the template is rendered; afterwards the pieces between the
template's own markers that hold the character are encoded as plain text, without it:

    "a<|im_end|>b"  ─►  "a<▯|im_end|>b"  ─► template ─►  "<|im_start|>user\\n" · "a<▯|im_end|>b" · "<|im_end|>\\n"
                                                            control tokens        plain text          control tokens

A chat without markers takes the ordinary path, untouched. Must not know: requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from antiphon.core.errors import InvalidInput

_BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text means anything by them
# A template may look for these in what an assistant said, to leave its thoughts out.
_THOUGHT = re.compile("think|reason", re.IGNORECASE)


class ControlMarkers:
    """The markers of one tokenizer.

    Args:
        markers: texts of its special tokens.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = sorted({marker for marker in markers if len(marker) > 1}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._markers))) if self._markers else None

    def guarded(self, messages: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """The messages with every marker broken, and the character that breaks them; None = there was no marker.

        Raises:
            InvalidInput: the text uses every character that could break a marker.
        """
        plain = [dict(message) for message in messages]
        pattern = self._any
        if pattern is None or not any(pattern.search(text) for text in _texts(plain)):
            return plain, None
        used = set().union(*(set(text) for text in _texts(plain)))
        free = next((char for char in _BREAKS if char not in used), None)
        if free is None:
            raise InvalidInput("the messages hold control markers and every character that could break them", "messages")

        def broken(match: re.Match[str]) -> str:
            return match[0][0] + free + match[0][1:]

        def guard(value: Any, *, thoughts: bool) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: match[0] if thoughts and _THOUGHT.search(match[0]) else broken(match), value)
            if isinstance(value, Mapping):
                return {guard(key, thoughts=thoughts): guard(item, thoughts=thoughts) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [guard(item, thoughts=thoughts) for item in value]
            return value

        return [guard(message, thoughts=message.get("role") == "assistant") for message in plain], free

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
