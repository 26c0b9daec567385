"""Finds stop strings in text that comes in pieces (request speed: once per token).

The first stop string that is complete ends the text, and the text is cut where that string begins; of several that become
complete with the same character, the longest counts. So the result doesn't depend on how the text is cut into pieces:

    stops ["\\nUser:", "##"]    "Hi" "\\nUs" "e" "d" "#" "#x"   →   "Hi" "" "" "\\nUsed" "" "" cut

Each stop string is matched by its own Knuth-Morris-Pratt automaton, so that a character costs O(number of stops). Must not
know: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Automaton:
    pattern: str
    fallback: list[int]  # by matched length - 1: the longest shorter match that may still succeed
    matched: int = 0

    def feed(self, char: str) -> bool:
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self.fallback[self.matched - 1]
        if self.pattern[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.pattern)

    def passed_over(self) -> None:
        """A complete match that doesn't count: what of it may begin the next one stays."""
        if self.matched == len(self.pattern):
            self.matched = self.fallback[-1]


class StopMatcher:
    """Watches one choice's text. After a match nothing more may be fed.

    Args:
        stops: non-empty strings.
        include_stop: keep the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._automata = [_Automaton(pattern=stop, fallback=_fallback(stop)) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, muted: bool = False) -> str:
        """Take the next piece; returns what is now known to be outside any stop string.

        A stop string that ends within a ``muted`` piece doesn't count; one that only begins there does.
        """
        if not self._automata:
            return text
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            char = buffer[position]
            complete = [automaton.pattern for automaton in self._automata if automaton.feed(char)]
            if complete and muted:
                for automaton in self._automata:
                    automaton.passed_over()
            elif complete:
                self.matched = max(complete, key=len)
                self._held = ""
                end = position + 1
                return buffer[: end if self._include_stop else end - len(self.matched)]
        num_held = max(automaton.matched for automaton in self._automata)
        cut = len(buffer) - num_held
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """The text ended without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held


def _fallback(pattern: str) -> list[int]:
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table
