"""Word vectors: whole words by how often they stand in the training prompts (control speed, offline).

TF-IDF with a logarithmic count and a truncated SVD, on the rows that a model is fitted on and no others. The plainest text
classifier there is, and a hard one to beat: as a second opinion it knows what subword tokens and presence leave out. Must not
know: labels, scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.routing.embedding import StaticEmbedding, WordVectors, quantised

_MIN_CHARS = 2  # of a word: single letters and marks say little
_MAX_WORDS = 20_000
_MANY_TEXTS = 200  # from here on a word of one text alone is left out
_NUM_PASSES = 5  # of the randomised decomposition


@dataclass(frozen=True, slots=True, kw_only=True)
class WordCounts:
    """How often each word stands in each text."""

    words: tuple[str, ...]  # U
    count_BU: csr_matrix

    def of(self, embedding: StaticEmbedding, texts: Sequence[str]) -> WordCounts:
        """The same words in other texts."""
        return _counted({word: place for place, word in enumerate(self.words)}, embedding, texts)


def word_counts(embedding: StaticEmbedding, texts: Sequence[str]) -> WordCounts:
    """Words of the windows of ``texts``, the ones of most texts first, at most 20,000."""
    in_texts: Counter[str] = Counter()
    for text in texts:
        in_texts.update({word for word in embedding.words_of(text) if len(word) >= _MIN_CHARS})
    frequent = sorted(in_texts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_WORDS]
    return _counted({word: place for place, (word, _) in enumerate(frequent)}, embedding, texts)


def _counted(index: dict[str, int], embedding: StaticEmbedding, texts: Sequence[str]) -> WordCounts:
    columns: list[int] = []
    counts: list[int] = []
    starts = [0]
    for text in texts:
        found = Counter(index[word] for word in embedding.words_of(text) if word in index)
        columns += found.keys()
        counts += found.values()
        starts.append(len(columns))
    shape = (len(texts), len(index))
    count_BU = csr_matrix((np.array(counts, np.float32), np.array(columns, np.int32), np.array(starts)), shape=shape)
    return WordCounts(words=tuple(index), count_BU=count_BU)


def fit_words(known: WordCounts, rows: Ints, num_directions: int, seed: int) -> WordVectors:
    """Vectors of the words of these rows."""
    count_RU = known.count_BU[rows]
    num_words = len(known.words)
    num_texts_U = np.bincount(count_RU.indices, minlength=num_words)
    used: Ints = np.flatnonzero(num_texts_U >= (2 if len(rows) > _MANY_TEXTS else 1))
    table_UD = np.zeros((len(used), num_directions), np.float32)
    num = min(num_directions, len(rows) - 1, len(used) - 1)
    if num >= 1:
        rarity_U = (np.log((1.0 + len(rows)) / (1.0 + num_texts_U[used])) + 1.0).astype(np.float32)
        weighted = _logarithmic(count_RU[:, used]).multiply(rarity_U).tocsr()
        _, _, directions_DU = randomized_svd(normalize(weighted), num, n_iter=_NUM_PASSES, random_state=seed)
        table_UD[:, :num] = directions_DU.T * rarity_U[:, None]
    return WordVectors(words=tuple(known.words[u] for u in used), vectors=quantised(table_UD))


def word_rows(known: WordCounts, rows: Ints, words: WordVectors) -> Floats:
    """What ``StaticEmbedding.encode`` puts behind the topics, for many texts at once."""
    place = {word: u for u, word in enumerate(known.words)}
    columns = np.array([place[word] for word in words.words], np.int64)
    table_UD = words.vectors.scale_V[:, None] * words.vectors.table_VD.astype(np.float32)
    result: Floats = normalize(np.asarray(_logarithmic(known.count_BU[rows][:, columns]) @ table_UD, np.float32))
    return result


def _logarithmic(count_BU: csr_matrix) -> csr_matrix:
    """One plus the logarithm of every count that is not zero."""
    result = count_BU.copy()
    result.data = 1.0 + np.log(result.data)
    return result
