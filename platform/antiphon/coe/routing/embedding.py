"""The fast path's embedding: the mean of static token vectors and the shape of the text, microseconds (request speed).

Works in plain numpy on arrays of the router artifact. The prompt is cut to a window first, so the time is bounded for any input.
Must not know: categories, experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.framing import without_framing
from antiphon.coe.routing.wordpiece import WordPiece, window

Floats = npt.NDArray[np.float32]

# Groups of characters whose share of the text is a feature: figures, formulas, code, lists, quotes and dialogue, markup.
_GROUPS = ("0123456789", "$\\^{}", "()[];:=<>_", ",", "\"'`", "#*|/-")
_GROUP_IDS = tuple(bytes((i,)) for i in range(1, len(_GROUPS) + 1))
# Every ASCII character as the id of its group, 0 where it is in none: counting an id is one pass in C.
_GROUP_OF = bytes(next((i for i, group in enumerate(_GROUPS, 1) if chr(code) in group), 0) for code in range(256))
NUM_SHAPE = len(_GROUPS) + 2
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
class StaticEmbedding:
    """Token vectors in int8 with one scale per token. An embedding is [D + NUM_SHAPE]: the normalised mean, then the shape."""

    tokens: WordPiece
    table_VD: npt.NDArray[np.int8]
    scale_V: Floats
    num_head_chars: int = 1024
    num_tail_chars: int = 256
    max_tokens: int = 320

    @property
    def num_dimensions(self) -> int:
        """Length of an embedding."""
        return int(self.table_VD.shape[1]) + NUM_SHAPE

    def encode(self, text: str) -> Floats:
        """Embedding of the window of ``text`` without its framing; the first D numbers have length 1, or 0 without tokens."""
        seen = window(without_framing(text), self.num_head_chars, self.num_tail_chars)
        ids = self.tokens.encode(seen, self.max_tokens)
        D = self.table_VD.shape[1]
        embedding = np.zeros(D + NUM_SHAPE, np.float32)
        embedding[D:] = shape_of(seen)
        embedding[D:] *= _SHAPE_SCALE
        if ids:
            # One product of scales and int8 rows: the weighted sum without a scaled fp32 copy of the rows.
            id_T = np.array(ids)
            summed: Floats = self.scale_V[id_T] @ self.table_VD[id_T].astype(np.float32)
            norm = math.sqrt(float(summed @ summed))
            if norm > 0.0:
                embedding[:D] = summed / np.float32(norm)
        return embedding

    def encode_all(self, texts: Sequence[str]) -> Floats:
        """Embeddings [len(texts), num_dimensions]; row by row the same arithmetic as ``encode``."""
        rows = np.zeros((len(texts), self.num_dimensions), np.float32)
        for i, text in enumerate(texts):
            rows[i] = self.encode(text)
        return rows


def quantised(table_VD: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], Floats]:
    """A table of token vectors as int8 [V, D] and a scale per token [V]."""
    largest = np.abs(table_VD).max(axis=1)
    scale = np.where(largest > 0, largest / 127.0, 1.0)
    return np.rint(table_VD / scale[:, None]).astype(np.int8), scale.astype(np.float32)
