"""What a document's prices and memory leave of its experts: worked out once per artifact, not per request (control speed).

The artifact's landmarks stand for the requests to come: their expected scores say who would be asked how often at which weight
of cost, so that an average price can be kept, and which experts are worth their memory. Must not know: requests, experts' state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.artifact import Artifact
from antiphon.coe.routing.assessment import assess
from antiphon.core.document.coe.experts import ExpertSpec
from antiphon.core.document.composition import CompositionSpec
from antiphon.core.document.pools import parse_quantity

_MAX_ROWS = 500  # landmarks that are looked at
_MAX_EXHAUSTIVE = 12  # experts whose subsets are all tried; above, they are added one by one
_WEIGHTS = (0.0, *np.geomspace(1e-4, 8.0, 48).tolist())

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentBudget:
    """What the document's limits come to."""

    price_weight: float | None = None  # score given up for the dearest expert against a free one; None = no maxAvgCost
    avg_price: float = 0.0  # expected at that weight, per million tokens
    resident: frozenset[str] | None = None  # experts that maxMemory leaves; None = all


def price_of(expert: ExpertSpec) -> float:
    """An expert's price per million tokens, prompt and output in equal parts."""
    return (expert.price.input_per_mtok + expert.price.output_per_mtok) / 2


def document_budget(artifact: Artifact | None, spec: CompositionSpec) -> DocumentBudget:
    """The limits of ``spec`` over the requests that the artifact was trained for."""
    limit, memory = spec.policy.max_avg_cost, spec.policy.max_memory
    if artifact is None or (limit is None and memory is None):
        return DocumentBudget()
    scores_RM = _expected_scores(artifact, spec)
    resident = None if memory is None else _resident(scores_RM, spec, int(parse_quantity(memory)))
    if limit is None:
        return DocumentBudget(resident=resident)
    kept = [m for m, expert in enumerate(spec.experts) if resident is None or expert.name in resident]
    prices_M = np.array([price_of(spec.experts[m]) for m in kept])
    weight, average = _price_weight(scores_RM[:, kept], prices_M, limit)
    return DocumentBudget(price_weight=weight, avg_price=average, resident=resident)


def _expected_scores(artifact: Artifact, spec: CompositionSpec) -> Array:
    """Expected score of each expert of the document on each landmark, [rows, experts]."""
    path = artifact.fast
    landmarks_ND = path.fitted.landmarks_ND
    rows_RD = landmarks_ND[:: max(1, -(-len(landmarks_ND) // _MAX_ROWS))]
    found = assess(path.fitted.raw(rows_RD), path.fitted, path.mix, path.gate)
    order = [artifact.expert_names.index(expert.name) for expert in spec.experts]
    return np.asarray(found.scores_BM[:, order], np.float64)


def _price_weight(scores_RM: Array, prices_M: Array, limit: float) -> tuple[float, float]:
    """The least weight of price that keeps the average within ``limit``, and the average; the largest where none does."""
    largest = float(prices_M.max(initial=0.0))
    average = 0.0
    for weight in _WEIGHTS:
        picked_R = (scores_RM - weight * prices_M / max(largest, 1e-12)).argmax(axis=1)
        average = float(prices_M[picked_R].mean())
        if average <= limit:
            return weight, average
    return _WEIGHTS[-1], average


def _resident(scores_RM: Array, spec: CompositionSpec, max_bytes: int) -> frozenset[str]:
    """The experts with the best expected score that fit together; the general one always does, external ones need nothing."""
    sizes = [0 if e.external is not None or e.memory_bytes is None else e.memory_bytes for e in spec.experts]
    general = next(m for m, expert in enumerate(spec.experts) if expert.name == spec.general)
    always = {general, *(m for m, size in enumerate(sizes) if size == 0)}
    rest = [m for m in range(len(sizes)) if m not in always]
    room = max_bytes - sizes[general]

    def value(chosen: Sequence[int]) -> float:
        return float(scores_RM[:, sorted({*always, *chosen})].max(axis=1).mean())

    best: tuple[int, ...] = ()
    if len(rest) <= _MAX_EXHAUSTIVE:
        subsets = itertools.chain.from_iterable(itertools.combinations(rest, n) for n in range(len(rest) + 1))
        fitting = [subset for subset in subsets if sum(sizes[m] for m in subset) <= room]
        best = max(fitting, key=lambda subset: (value(subset), -len(subset)), default=())
    else:
        left = list(rest)
        while left := [m for m in left if sizes[m] <= room - sum(sizes[b] for b in best)]:
            base = value(best)
            chosen = max(left, key=lambda m: (value((*best, m)) - base) / sizes[m])
            if value((*best, chosen)) <= base:
                break
            best = (*best, chosen)
            left.remove(chosen)
    return frozenset(spec.experts[m].name for m in {*always, *best})
