"""WordPiece tokens of uncased BERT models, in pure Python (request speed).

Bounded by construction: a prompt is cut to a window of characters before any work, a word longer than ``MAX_WORD_CHARS``
becomes the unknown token. Ours rather than the tokenizers library's, which takes five times as long for a prompt
(``tests/bench/coe/wordpiece.py``: 22 against 113 us, median of 299 prompts, one core). Must not know: what the tokens are used for.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from antiphon.core.errors import CheckpointInvalid

MAX_WORD_CHARS = 100
MAX_CACHED_WORDS = 65_536  # the cache is emptied when full; it never changes a result

# A run of letters and digits; or one ideograph, mark of punctuation or symbol (the underscore counts as one).
_WORD = re.compile(r"[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|[^\s\w]|[_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_ASCII_WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")  # the same of ASCII in lower case, in half the time
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufffd\ud800-\udfff]")


def window(text: str, num_head_chars: int, num_tail_chars: int) -> str:
    """The first and last characters of ``text``; the whole text when it is no longer than both together."""
    if len(text) <= num_head_chars + num_tail_chars:
        return text
    return text[:num_head_chars] + " " + text[len(text) - num_tail_chars :] if num_tail_chars else text[:num_head_chars]


class WordPiece:
    """Splits text into ids of a vocabulary. Safe to share between threads: its cache only ever holds final results."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """``vocabulary`` lists one token per id; tokens that continue a word start with ``##``.

        Raises:
            CheckpointInvalid: the vocabulary lacks [UNK], [CLS] or [SEP].
        """
        self.vocabulary = tuple(vocabulary)
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in self._ids:
                raise CheckpointInvalid(f"the vocabulary has no {token} token")
        self.unk_id, self.cls_id, self.sep_id = self._ids["[UNK]"], self._ids["[CLS]"], self._ids["[SEP]"]
        self._cache: dict[str, tuple[int, ...]] = {}

    def __contains__(self, word: str) -> bool:
        """Whether the word is a token by itself."""
        return word in self._ids

    @classmethod
    def from_file(cls, path: Path) -> WordPiece:
        """Read a ``vocab.txt``: one token per line, the line's number is the id.

        Raises:
            CheckpointInvalid: the file is missing, not UTF-8 or lacks a special token.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointInvalid(f"vocabulary {path.name} can't be read: {error}") from error
        return cls(text.removesuffix("\n").split("\n"))

    @staticmethod
    def words(text: str) -> list[str]:
        """Words, ideographs, marks and symbols of ``text``: lower case, without accents."""
        if text.isascii():
            return _ASCII_WORD.findall(text.lower())
        text = unicodedata.normalize("NFD", _CONTROL.sub("", text).lower())
        return _WORD.findall("".join([c for c in text if unicodedata.category(c) != "Mn"]))

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """At most ``max_tokens`` ids of ``text``, without special tokens."""
        return self.encode_words(self.words(text), max_tokens)

    def encode_words(self, words: Sequence[str], max_tokens: int) -> list[int]:
        """The same of words that ``words`` found."""
        cache = self._cache
        known = [pieces for pieces in map(cache.get, words) if pieces is not None]
        if len(known) == len(words):  # as in most prompts, once the cache is warm
            return list(itertools.islice(itertools.chain.from_iterable(known), max_tokens))
        ids: list[int] = []
        for word in words:
            pieces = cache.get(word)
            if pieces is None:
                pieces = self._pieces(word)
                if len(cache) >= MAX_CACHED_WORDS:
                    cache.clear()
                cache[word] = pieces
            ids += pieces
            if len(ids) >= max_tokens:
                return ids[:max_tokens]
        return ids

    def _pieces(self, word: str) -> tuple[int, ...]:
        if len(word) > MAX_WORD_CHARS:
            return (self.unk_id,)
        pieces: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            end = len(word)
            while end > start and (found := self._ids.get(prefix + word[start:end])) is None:
                end -= 1
            if end == start:
                return (self.unk_id,)
            assert found is not None  # the loop ended above start, so the last look-up hit
            pieces.append(found)
            start, prefix = end, "##"
        return tuple(pieces)
