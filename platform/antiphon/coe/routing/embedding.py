"""The fast path's embedding: static token vectors, the shape of the text, topics of training, microseconds (request speed).

Works on arrays of the router artifact: in C (native/reader.h), or in numpy where that is not built. The prompt is cut to a window
first, so the time is bounded for any input. Must not know: categories, experts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.framing.core import without_framing
from antiphon.coe.routing.native import build
from antiphon.coe.routing.spelling import Spelling
from antiphon.coe.routing.wordpiece import WordPiece, window

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Groups of characters whose share of the text is a feature: figures, formulas, code, lists, quotes and dialogue, markup.
_GROUPS = ("0123456789", "$\\^{}", "()[];:=<>_", ",", "\"'`", "#*|/-")
_GROUP_IDS = tuple(bytes((i,)) for i in range(1, len(_GROUPS) + 1))
# Every ASCII character as the id of its group, 0 where it is in none: counting an id is one pass in C.
_GROUP_OF = bytes(next((i for i, group in enumerate(_GROUPS, 1) if chr(code) in group), 0) for code in range(256))
NUM_SHAPE = len(_GROUPS) + 2
_UNKNOWN = -1  # the place of a word that has no vector
# As the plain router reads a text: words of two letters, figures or underscores and more, of all of it that a prompt has by far.
_WORD = re.compile(r"\w\w+")
_HEAD_CHARS, _TAIL_CHARS = 12_288, 4_096
_SHAPE_SCALE = np.float32(0.35)  # keeps the shape's spread near that of one direction of the token vectors


def shape_of(text: str) -> list[float]:
    """NUM_SHAPE features of a text, each about 0..1: root shares of character groups, of non-ASCII, and its logarithmic length."""
    total = max(1, len(text))
    groups = text.encode("ascii", "replace").translate(_GROUP_OF)  # what is not ASCII becomes a mark of no group
    features = [math.sqrt(min(1.0, groups.count(group) / total)) for group in _GROUP_IDS]
    num_wide = 0 if text.isascii() else sum(char > "\x7f" for char in text)
    features += [math.sqrt(num_wide / total), math.log1p(len(text)) / 8.0]
    return features


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenVectors:
    """One vector per token of the vocabulary: int8, words' int16, with one scale per token."""

    table_VD: npt.NDArray[np.int8] | npt.NDArray[np.int16]
    scale_V: Floats

    def direction(self, id_U: Ints, into_D: Floats, weight_U: Floats | None = None) -> None:
        """Write the normalised sum of the tokens' vectors, by weight, into ``into_D``; it is left alone when the sum is zero."""
        scale_U = self.scale_V.take(id_U)
        if weight_U is not None:
            scale_U *= weight_U
        # One product of scales and rows of integers: the weighted sum without a scaled fp32 copy of the rows.
        # ``take`` gathers rows in half the time of an index.
        summed_D: Floats = scale_U @ self.table_VD.take(id_U, axis=0).astype(np.float32)
        norm = math.sqrt(float(summed_D @ summed_D))
        if norm > 0.0:
            np.multiply(summed_D, np.float32(1.0 / norm), out=into_D)


def _distinct(counts: Mapping[int, int]) -> tuple[Ints, Floats | None]:
    """What is counted, and how often each; None where all of it stands once, as in most short prompts."""
    id_U = np.array(list(counts))
    times = list(counts.values())
    return id_U, None if max(times) == 1 else np.array(times, np.float32)


@dataclass(frozen=True, kw_only=True)
class WordVectors:
    """One vector per word of the training prompts: a second opinion that knows whole words and how often they stand."""

    words: tuple[str, ...]
    vectors: TokenVectors
    num_texts_U: npt.NDArray[np.int32] | None = None  # training prompts that have each; None: misspelt words are not corrected

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made from the rest."""
        return {name: value for name, value in self.__dict__.items() if name not in ("index", "spelling")}

    @cached_property
    def spelling(self) -> Spelling | None:
        """Says which word a misspelt one was meant to be; None where none is corrected."""
        return None if self.num_texts_U is None else Spelling(self.words, self.num_texts_U)

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of each word."""
        return {word: place for place, word in enumerate(self.words)}

    def place_of(self, word: str, tokens: WordPiece) -> int:
        """The place of a word, or of the one that it was meant to be where neither training prompts nor tokens know it."""
        place = self.index.get(word)
        if place is None and self.spelling is not None and word not in tokens:
            place = self.spelling.meant(word)
        return _UNKNOWN if place is None else place

    def direction(self, words: Iterable[str], tokens: WordPiece, into_D: Floats) -> None:
        """Write the normalised sum of the words' vectors, each by one plus the logarithm of its count, into ``into_D``."""
        counts = Counter(map(self.place_of, words, itertools.repeat(tokens)))
        counts.pop(_UNKNOWN, None)
        if not counts:
            return
        id_U, count_U = _distinct(counts)
        if count_U is not None:
            np.log(count_U, out=count_U)
            count_U += np.float32(1.0)
        self.vectors.direction(id_U, into_D, count_U)


@dataclass(frozen=True, kw_only=True)
class StaticEmbedding:
    """What the fast path sees of a text: [near D | shape NUM_SHAPE | topics | words].

    near: the normalised sum of its tokens' vectors. topics: the same of the distinct tokens' vectors in a space that was made
    from the training prompts alone: words that stand together there. words: the same of whole words and their counts. Topics and
    words have no numbers before training.

    Near, shape and topics see a window of the text without its framing. Words are those of all of it, framing and all, where that
    is how training prompts stood; else what stands around them, and was not learnt from, comes off.
    """

    tokens: WordPiece
    near: TokenVectors
    topics: TokenVectors | None = None
    words: WordVectors | None = None
    num_head_chars: int = 1024
    num_tail_chars: int = 256
    max_tokens: int = 320
    whole_words: bool = True  # False: words are those of the window, as artifacts before format 7 learnt them
    known_frames: frozenset[str] = frozenset()  # ``frame_of`` what stands around several of the training prompts
    native: bool = True  # in C where it is built; to the rounding of sums both are the same

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made from the rest."""
        return {name: value for name, value in self.__dict__.items() if name != "reader"}

    @cached_property
    def reader(self) -> Any | None:
        """The native reader of texts, made once; None where numpy reads them."""
        module = build.load() if self.native else None
        if module is None:
            return None
        words, topics = self.words, self.topics
        return module.Reader(
            self.tokens.vocabulary,
            () if words is None else words.words,
            _pair(self.near, np.int8),
            None if topics is None else _pair(topics, np.int8),
            None if words is None else _pair(words.vectors, np.int16),
            self.tokens.unk_id,
            self.max_tokens,
            _GROUP_OF,
            float(_SHAPE_SCALE),
            None if words is None or words.num_texts_U is None else np.ascontiguousarray(words.num_texts_U, np.int32),
        )

    def make_ready(self) -> None:
        """Make the reader now rather than at the first text: it takes milliseconds, a minute at most where it is compiled."""
        _ = self.reader

    @property
    def num_near(self) -> int:
        """Numbers that similarity is measured in: the first ones."""
        return int(self.near.table_VD.shape[1])

    @cached_property
    def num_dimensions(self) -> int:
        """Length of an embedding."""
        num_topics = 0 if self.topics is None else int(self.topics.table_VD.shape[1])
        return self.num_near + NUM_SHAPE + num_topics + (0 if self.words is None else int(self.words.vectors.table_VD.shape[1]))

    def ids(self, text: str) -> list[int]:
        """Tokens of what is seen of ``text``."""
        return self.tokens.encode(self._seen(text), self.max_tokens)

    def words_of(self, text: str) -> list[str]:
        """Words of ``text``, each as often as it stands there."""
        core = without_framing(text)
        return self._words(self._whole(text, core)) if self.whole_words else self.tokens.words(self._window(core))

    def words_learnt(self, text: str) -> list[str]:
        """Words of a training prompt: of all of it, as whoever learns from the table reads it."""
        return self._words(window(text, _HEAD_CHARS, _TAIL_CHARS))

    def _seen(self, text: str) -> str:
        return self._window(without_framing(text))

    def _window(self, core: str) -> str:
        return window(core, self.num_head_chars, self.num_tail_chars)

    def _whole(self, text: str, core: str) -> str:
        """What words are looked for in: the text, or its core where what stands around it is not known."""
        known = len(core) == len(text) or frame_of(text, core) in self.known_frames
        return window(text if known else core, _HEAD_CHARS, _TAIL_CHARS)

    @staticmethod
    def _words(whole: str) -> list[str]:
        return _WORD.findall(whole.lower())

    def encode(self, text: str) -> Floats:
        """Embedding of the window of ``text`` without its framing; each part of vectors has length 1, or 0 without tokens."""
        core = without_framing(text)
        seen = self._window(core)
        whole = "" if self.words is None or not self.whole_words else self._whole(text, core)
        embedding = np.zeros(self.num_dimensions, np.float32)
        if self.reader is None:
            self._encode(seen, whole, embedding)
            return embedding
        pieces = None if seen.isascii() else self.tokens.words(seen)
        words = None if whole.isascii() else self._words(whole)
        if self.words is not None and not self.whole_words:
            words = self.tokens.words(seen)
        self.reader.encode(seen, pieces, whole, words, embedding)
        return embedding

    def _encode(self, seen: str, whole: str, embedding: Floats) -> None:
        pieces = self.tokens.words(seen)
        ids = self.tokens.encode_words(pieces, self.max_tokens)
        D = self.num_near
        embedding[D : D + NUM_SHAPE] = shape_of(seen)
        embedding[D : D + NUM_SHAPE] *= _SHAPE_SCALE
        if ids:
            id_U, count_U = _distinct(Counter(ids))
            self.near.direction(id_U, embedding[:D], count_U)
            begin = D + NUM_SHAPE
            if self.topics is not None:
                end = begin + self.topics.table_VD.shape[1]
                self.topics.direction(id_U, embedding[begin:end])
                begin = end
            if self.words is not None:
                self.words.direction(self._words(whole) if self.whole_words else pieces, self.tokens, embedding[begin:])

    def encode_all(self, texts: Sequence[str]) -> Floats:
        """Embeddings [len(texts), num_dimensions]; row by row the same arithmetic as ``encode``."""
        rows = np.zeros((len(texts), self.num_dimensions), np.float32)
        for i, text in enumerate(texts):
            rows[i] = self.encode(text)
        return rows


def frame_of(text: str, core: str) -> str:
    """What stands around ``core`` in ``text``, as a short hash: it may have been somebody's words."""
    begin = max(0, text.find(core))
    around = f"{text[:begin].strip()}\0{text[begin + len(core) :].strip()}"
    return hashlib.sha256(around.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _pair(vectors: TokenVectors, kind: type[np.signedinteger[Any]]) -> tuple[npt.NDArray[Any], Floats]:
    return np.ascontiguousarray(vectors.table_VD, kind), np.ascontiguousarray(vectors.scale_V, np.float32)


def quantised(table_VD: npt.NDArray[np.floating], kind: Any = np.int8) -> TokenVectors:
    """A table of token vectors [V, D] in int8, or int16 where less rounding is asked for."""
    largest = np.abs(table_VD).max(axis=1)
    scale = np.where(largest > 0, largest / np.iinfo(kind).max, 1.0)
    return TokenVectors(table_VD=np.rint(table_VD / scale[:, None]).astype(kind), scale_V=scale.astype(np.float32))
