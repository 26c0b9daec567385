"""Topics: token vectors from which distinct tokens stand together in the training prompts (control speed, offline).

TF-IDF over presence and a truncated SVD, on the rows that a model is fitted on and no others: a judged prompt has no part in the
space that it is judged in. Must not know: labels, scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.routing.embedding import StaticEmbedding, TokenVectors, quantised

_MIN_TEXTS = 2  # a token of fewer texts has no company to be known by
_NUM_PASSES = 2  # of the randomised decomposition: more change no decision


def presence(embedding: StaticEmbedding, texts: Sequence[str]) -> csr_matrix:
    """Which distinct tokens each text has [len(texts), vocabulary]."""
    found = [sorted(set(embedding.ids(text))) for text in texts]
    columns = np.array([token for ids in found for token in ids], np.int32)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in found])])
    return csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=(len(texts), len(embedding.tokens.vocabulary)))


def fit_topics(present_BV: csr_matrix, weight_V: npt.NDArray[np.float64], num_topics: int, seed: int) -> TokenVectors:
    """Topics of these texts; ``weight_V`` weighs tokens beside their rarity."""
    num_texts, num_tokens = present_BV.shape
    count_V = np.bincount(present_BV.indices, minlength=num_tokens)
    used: Ints = np.flatnonzero(count_V >= _MIN_TEXTS)
    table_VT = np.zeros((num_tokens, num_topics), np.float32)
    num = min(num_topics, num_texts - 1, len(used) - 1)
    if num >= 1:
        rarity_U = ((np.log((1.0 + num_texts) / (1.0 + count_V[used])) + 1.0) * weight_V[used]).astype(np.float32)
        weighted = present_BV[:, used].multiply(rarity_U).tocsr()
        _, _, directions_TU = randomized_svd(normalize(weighted), num, n_iter=_NUM_PASSES, random_state=seed)
        table_VT[used, :num] = directions_TU.T * rarity_U[:, None]
    return quantised(table_VT)


def topic_rows(present_BV: csr_matrix, topics: TokenVectors) -> Floats:
    """What ``StaticEmbedding.encode`` puts behind the shape, for many texts at once."""
    used = np.unique(present_BV.indices)
    vectors_UT = topics.scale_V[used, None] * topics.table_VD[used].astype(np.float32)
    result: Floats = normalize(np.asarray(present_BV[:, used] @ vectors_UT, np.float32))
    return result
