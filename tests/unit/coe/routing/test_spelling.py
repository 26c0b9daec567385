"""Which training word a misspelt one was meant to be, against a search through all of them by their edit distance."""

import random

import numpy as np
import pytest

from antiphon.coe.routing.spelling import Spelling

LETTERS = "abc"


def _distance(a: str, b: str) -> int:
    """Letters left out, put in or taken for another, and neighbours that changed places (optimal string alignment)."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j]))
        if i and j and a[i] == b[j - 1] and a[i - 1] == b[j]:
            table[i + 1, j + 1] = min(table[i + 1, j + 1], table[i - 1, j - 1] + 1)
    return int(table[-1, -1])


@pytest.mark.parametrize("seed", range(4))
def test_the_most_common_word_at_distance_one_was_meant(seed: int) -> None:
    source = random.Random(seed)
    words = sorted({"".join(source.choices(LETTERS, k=source.randint(4, 7))) for _ in range(60)})
    num_texts = np.array([source.randint(1, 4) for _ in words], np.int32)
    spelling = Spelling(words, num_texts)
    for _ in range(300):
        asked = "".join(source.choices(LETTERS, k=source.randint(4, 8)))
        if asked in words:
            continue
        near = [place for place, word in enumerate(words) if _distance(asked, word) == 1]
        expected = max(near, key=lambda place: (num_texts[place], -place)) if near else None
        assert spelling.meant(asked) == expected


@pytest.mark.parametrize("word", ["cat", "c4ts", "x" * 25, "kätze", ""])
def test_what_is_short_long_or_not_of_letters_is_taken_as_it_stands(word: str) -> None:
    words = ["cats", "catz", "x" * 24]
    assert Spelling(words, np.ones(len(words), np.int32)).meant(word) is None
