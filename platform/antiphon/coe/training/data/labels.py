"""Category and source labels of a table: given, grown from seeds, or found (control speed, offline).

    every row labelled      taken as given
    some rows labelled      seeds: grown by agreement of nearest labelled neighbours until nothing changes, then of datasets
    none, several datasets  the dataset is the category
    none, one dataset       clusters of the embeddings

Must not know: experts, scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans

from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.training.data.table import ScoreTable

MIN_SOURCE_ROWS = 15
_NUM_NEIGHBOURS = 10
_AGREEMENT = 0.8
_MAX_ROUNDS = 20
_NUM_CLUSTERS = 8
_MIN_CLUSTER_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """A category and a source (finer class: category and dataset) for each row; -1 = no category."""

    categories: tuple[str, ...]
    category_B: Ints
    sources: tuple[str, ...]
    source_B: Ints
    how: str  # given, grown, datasets or clusters
    num_unlabelled: int


def label(table: ScoreTable, embedding_BD: Floats, seed: int) -> Labels:
    """Labels of every row; deterministic for a seed."""
    given = [category for category in table.categories if category is not None]
    if len(given) == len(table):
        names, how = [str(category) for category in table.categories], "given"
    elif given:
        names, how = _by_dataset(grow(list(table.categories), embedding_BD), table.datasets), "grown"
    elif len(set(table.datasets)) > 1:
        names, how = list(table.datasets), "datasets"
    else:
        names, how = _clusters(embedding_BD, seed), "clusters"
    categories = tuple(sorted({name for name in names if name}))
    index = {name: i for i, name in enumerate(categories)}
    category_B = np.array([index.get(name, -1) for name in names], np.int64)
    sources, source_B = _sources(table, names)
    return Labels(
        categories=categories,
        category_B=category_B,
        sources=sources,
        source_B=np.where(category_B < 0, -1, source_B),
        how=how,
        num_unlabelled=int((category_B < 0).sum()),
    )


def grow(seeds: list[str | None], embedding_BD: Floats) -> list[str]:
    """Labels grown from ``seeds``: a row takes the label that most of its nearest labelled rows agree on; "" = never agreed."""
    labels = [label or "" for label in seeds]
    for _ in range(_MAX_ROUNDS):
        known = np.array([i for i, label in enumerate(labels) if label], np.int64)
        unknown = np.array([i for i, label in enumerate(labels) if not label], np.int64)
        if not len(unknown):
            break
        similarity = embedding_BD[unknown] @ embedding_BD[known].T
        k = min(_NUM_NEIGHBOURS, len(known))
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        grown = 0
        for row, neighbours in zip(unknown, nearest, strict=True):
            (found, count), *_ = Counter(labels[known[n]] for n in neighbours).most_common(1)
            if count >= _AGREEMENT * k:
                labels[row] = found
                grown += 1
        if not grown:
            break
    return labels


def _by_dataset(names: list[str], datasets: Sequence[str]) -> list[str]:
    """Rows that never agreed take what most labelled rows of their dataset have: a few that read oddly are no kind of their own.

    Not in a table of one dataset, which tells nothing apart.
    """
    found: dict[str, Counter[str]] = {dataset: Counter() for dataset in datasets}
    for name, dataset in zip(names, datasets, strict=True):
        if name:
            found[dataset][name] += 1
    clear = {}
    for dataset, counts in found.items():
        for name, count in counts.most_common(1):
            if len(found) > 1 and count >= _AGREEMENT * counts.total():
                clear[dataset] = name
    return [name or clear.get(dataset, "") for name, dataset in zip(names, datasets, strict=True)]


def _clusters(embedding_BD: Floats, seed: int) -> list[str]:
    num = max(1, min(_NUM_CLUSTERS, len(embedding_BD) // _MIN_CLUSTER_ROWS))
    found: npt.NDArray[np.int32] = KMeans(num, n_init=4, random_state=seed).fit(embedding_BD).labels_
    return [f"cluster-{int(c)}" for c in found]


def _sources(table: ScoreTable, names: list[str]) -> tuple[tuple[str, ...], Ints]:
    pairs = list(zip(names, table.datasets, strict=True))
    counts = Counter(pairs)
    full = [
        f"{name}/{dataset}" if counts[(name, dataset)] >= MIN_SOURCE_ROWS and dataset != name else name for name, dataset in pairs
    ]
    sources = tuple(sorted(set(full)))
    index = {source: i for i, source in enumerate(sources)}
    return sources, np.array([index[source] for source in full], np.int64)
