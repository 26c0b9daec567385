"""The routers that ours is compared with: each fitted on the same rows, asked about the same others (control speed, offline).

    simple    TF-IDF, SVD, logistic classification into datasets and categories, times the mean score per class
    kNN-100   mean score of the hundred nearest prompts
    ridge     one ridge regression per expert

Must not know: our own router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import normalize

from antiphon.coe.routing.assessment import Floats, Ints

Doubles = npt.NDArray[np.float64]

SIMPLE = "simple"
ORACLE = "oracle"  # the best expert of each row: what no router knows beforehand
COMPARISONS = (SIMPLE, "kNN-100", "ridge")
_NUM_NEIGHBOURS = 100
_NUM_TOPICS = 100
_INVERSE_PENALTY = 10.0  # of one logarithmic step, the value that serves the simple router best on the committed tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a comparison may look at. B rows, D numbers of an embedding, M experts."""

    prompts: Sequence[str]
    embedding_BD: Floats
    num_near: int  # the first numbers, which neighbours are measured in
    label_B: Ints  # dataset and category as one class; -1 = no category
    scores_BM: Doubles


def expected_scores(name: str, rows: Rows, seen: Ints, asked: Ints) -> Doubles:
    """Expected score [len(asked), M] of every expert, by the comparison ``name`` fitted on the rows ``seen``."""
    return _BY_NAME[name](rows, seen, asked)


def _simple(rows: Rows, seen: Ints, asked: Ints) -> Doubles:
    label_B = rows.label_B[seen]
    classes = np.unique(label_B)
    means_CM = np.stack([rows.scores_BM[seen[label_B == c]].mean(axis=0) for c in classes])
    if len(classes) == 1:
        return np.repeat(means_CM, len(asked), axis=0)
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(seen) > 200 else 1)
    counts = vectorizer.fit_transform([rows.prompts[i] for i in seen])
    topics = TruncatedSVD(min(_NUM_TOPICS, counts.shape[1] - 1, len(seen) - 1), random_state=0)
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=300, tol=1e-3)
    model.fit(normalize(topics.fit_transform(counts)), label_B)
    asked_topics = normalize(topics.transform(vectorizer.transform([rows.prompts[i] for i in asked])))
    result: Doubles = model.predict_proba(asked_topics) @ means_CM
    return result


def _neighbours(rows: Rows, seen: Ints, asked: Ints) -> Doubles:
    near_BD = rows.embedding_BD[:, : rows.num_near]
    similarity = near_BD[asked] @ near_BD[seen].T
    k = min(_NUM_NEIGHBOURS, len(seen))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    result: Doubles = rows.scores_BM[seen][nearest].mean(axis=1)
    return result


def _ridge(rows: Rows, seen: Ints, asked: Ints) -> Doubles:
    model = Ridge(alpha=10.0).fit(rows.embedding_BD[seen], rows.scores_BM[seen])
    result: Doubles = model.predict(rows.embedding_BD[asked]).reshape(len(asked), -1)  # one expert's come without a column
    return result


_BY_NAME: dict[str, Callable[[Rows, Ints, Ints], Doubles]] = dict(zip(COMPARISONS, (_simple, _neighbours, _ridge), strict=True))
