"""Finds the training word that a misspelt one was meant to be: one slip of the fingers away (request speed, microseconds).

    "exapmle" → "example": swapped; and one letter left out, put in or taken for another

Two words are a slip apart only where leaving out at most one letter of each makes them the same, so every training word stands in
a table under all that one letter less makes of it, and a misspelt one asks for its own (Garbe's symmetric deletes). The plain twin
of native/spelling.h. Must not know: vectors, what words are looked up for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# Shorter ones are a slip away from too many words, longer ones are seldom words.
LEAST_LETTERS, MOST_LETTERS = 4, 24

_SPELT = re.compile(rf"[a-z]{{{LEAST_LETTERS},{MOST_LETTERS}}}")


def can_be_misspelt(word: str) -> bool:
    """Whether a word of lower case is long enough and of nothing but letters."""
    return _SPELT.fullmatch(word) is not None


class Spelling:
    """Training words by what a slip makes of them. Shares nothing that changes but a cache of results."""

    def __init__(self, words: Sequence[str], num_texts_U: npt.NDArray[np.int32]) -> None:
        """``num_texts_U`` says in how many training prompts each word stands: of several words, the most common was meant."""
        self._words = words
        self._num_texts = num_texts_U.tolist()
        self._places: dict[str, list[int]] = {}
        for place, word in enumerate(words):
            if can_be_misspelt(word):
                for short in _shortened(word):
                    self._places.setdefault(short, []).append(place)

    def meant(self, word: str) -> int | None:
        """The place of the word that ``word``, which is no training word, was meant to be; None where there is none."""
        if not can_be_misspelt(word):
            return None
        best: int | None = None
        for short in _shortened(word):
            for place in self._places.get(short, ()):
                if best is None or (self._num_texts[place], -place) > (self._num_texts[best], -best):
                    best = place if _a_slip_apart(word, self._words[place]) else best
        return best


def _shortened(word: str) -> Iterator[str]:
    """The word, and what is left of it without each of its letters."""
    yield word
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]


def _a_slip_apart(a: str, b: str) -> bool:
    """Whether the words, which differ, do so by one letter, or by two neighbours that changed places."""
    if len(a) > len(b):
        a, b = b, a
    i = next((i for i, letter in enumerate(a) if letter != b[i]), len(a))
    if len(a) < len(b):
        return a[i:] == b[i + 1 :]
    return a[i + 1 :] == b[i + 1 :] or (a[i + 2 :] == b[i + 2 :] and a[i] == b[i + 1] and a[i + 1] == b[i])
