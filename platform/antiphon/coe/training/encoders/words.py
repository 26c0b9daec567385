"""Word vectors: whole words by how often they stand in the training prompts (control speed, offline).

TF-IDF with a logarithmic count and a truncated SVD, on the rows that a model is fitted on and no others. The plainest text
classifier there is, and a hard one to beat: as a second opinion it knows what subword tokens and presence leave out. The
arithmetic is that of scikit-learn's TfidfVectorizer and TruncatedSVD, to the order of words and in double precision: the plain
router picks between near-ties by the last directions, and a router that holds to its picks must pick the same. Must not know:
labels, scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.routing.embedding import StaticEmbedding, WordVectors, frame_of, quantised
from antiphon.coe.routing.framing.core import without_framing
from antiphon.coe.routing.spelling import can_be_misspelt
from antiphon.coe.routing.wordpiece import WordPiece

Doubles = npt.NDArray[np.float64]

_MAX_WORDS = 50_000
_MIN_FRAMED = 3  # prompts with the same words around them: a frame of the table's own
_MANY_TEXTS = 200  # from here on a word of one text alone is left out
_NUM_PASSES = 5  # of the randomised decomposition


@dataclass(frozen=True, slots=True, kw_only=True)
class WordCounts:
    """How often each word stands in each text."""

    words: tuple[str, ...]  # U
    count_BU: csr_matrix
    tokens: WordPiece  # what is one of them is not misspelt

    def of(self, embedding: StaticEmbedding, texts: Sequence[str]) -> WordCounts:
        """The same words, and misspelt ones, in other texts."""
        found = [embedding.words_of(text) for text in texts]
        misspelt = {word for words in found for word in words if can_be_misspelt(word)} - set(self.words)
        return _counted((*self.words, *sorted(misspelt)), found, self.tokens)


def word_counts(embedding: StaticEmbedding, texts: Sequence[str]) -> WordCounts:
    """Words of ``texts`` to learn from, in order of letters; the 50,000 of most texts."""
    in_texts: Counter[str] = Counter()
    learnt = [embedding.words_learnt(text) for text in texts]
    for words in learnt:
        in_texts.update(set(words))
    frequent = sorted(in_texts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_WORDS]
    return _counted(sorted(word for word, _ in frequent), learnt, embedding.tokens)


def known_frames(texts: Sequence[str]) -> frozenset[str]:
    """What stands around several of the texts: a template of theirs, not somebody's manners."""
    framed = Counter(frame_of(text, core) for text in texts if len(core := without_framing(text)) < len(text))
    return frozenset(frame for frame, num in framed.items() if num >= _MIN_FRAMED)


def _counted(words: Sequence[str], texts: Sequence[Sequence[str]], tokens: WordPiece) -> WordCounts:
    index = {word: place for place, word in enumerate(words)}
    columns: list[int] = []
    counts: list[int] = []
    starts = [0]
    for text in texts:
        found = Counter(index[word] for word in text if word in index)
        columns += found.keys()
        counts += found.values()
        starts.append(len(columns))
    shape = (len(texts), len(index))
    count_BU = csr_matrix((np.array(counts, np.float32), np.array(columns, np.int32), np.array(starts)), shape=shape)
    return WordCounts(words=tuple(words), count_BU=count_BU, tokens=tokens)


def fit_words(known: WordCounts, rows: Ints, num_directions: int, seed: int) -> tuple[WordVectors, Doubles]:
    """Vectors of the words of these rows, and what they make of the rows themselves before they are rounded."""
    count_RU = known.count_BU[rows]
    num_words = len(known.words)
    num_texts_U = np.bincount(count_RU.indices, minlength=num_words)
    used: Ints = np.flatnonzero(num_texts_U >= (2 if len(rows) > _MANY_TEXTS else 1))
    table_UD = np.zeros((len(used), num_directions))
    logarithmic = _logarithmic(count_RU[:, used])
    num = min(num_directions, len(rows) - 1, len(used) - 1)
    if num >= 1:
        rarity_U = np.log((1.0 + len(rows)) / (1.0 + num_texts_U[used])) + 1.0
        weighted = logarithmic.multiply(rarity_U).tocsr()
        _, _, directions_DU = randomized_svd(normalize(weighted), num, n_iter=_NUM_PASSES, random_state=seed)
        table_UD[:, :num] = directions_DU.T * rarity_U[:, None]
    vectors = WordVectors(
        words=tuple(known.words[u] for u in used),
        vectors=quantised(table_UD, np.int16),
        num_texts_U=num_texts_U[used].astype(np.int32),
    )
    return vectors, normalize(logarithmic @ table_UD)


def word_rows(known: WordCounts, rows: Ints, words: WordVectors) -> Floats:
    """What ``StaticEmbedding.encode`` puts behind the topics, for many texts at once."""
    count_RU = known.count_BU[rows]
    place_U = np.full(len(known.words), -1)
    for u in np.unique(count_RU.indices):
        place_U[u] = words.place_of(known.words[u], known.tokens)
    seen: Ints = np.flatnonzero(place_U >= 0)
    meant = csr_matrix((np.ones(len(seen), np.float32), (seen, place_U[seen])), shape=(len(place_U), len(words.words)))
    table_UD = words.vectors.scale_V[:, None] * words.vectors.table_VD.astype(np.float32)
    result: Floats = normalize(np.asarray(_logarithmic(count_RU @ meant) @ table_UD, np.float32))
    return result


def _logarithmic(count_BU: csr_matrix) -> csr_matrix:
    """One plus the logarithm of every count that is not zero."""
    result = count_BU.astype(np.float64)
    result.data = 1.0 + np.log(result.data)
    return result
