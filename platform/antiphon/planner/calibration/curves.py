"""Curves through measured times: what a stage or a step takes by rows and context (control speed).

A time is fitted as c0 + c1 n + c2 n C + c3 g(n), all c >= 0, n rows, C context; g is a knee max(n, k) (weights are read in any
case, then operations count) or a saturation 1 - exp(-n / k) (experts that a batch touches). Which g and k is chosen by leaving
one batch out at a time. What is left between the curve and the measurements (kernels change at batch sizes of their own) is kept as
a factor at each measured batch, and interpolated between them. Must not know: what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from antiphon.core.errors import InvalidInput
from antiphon.planner.pipeline.ubatches import FloatArray

MIN_BATCHES = 3
MIN_BATCHES_TO_CORRECT = 5  # fewer would pass their noise on
KNEES = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)

Bend = Literal["none", "knee", "saturation"]
Point = tuple[float, float, float]  # rows, context, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A fitted time."""

    bend: Bend
    knee: float
    fixed_s: float
    per_row_s: float
    per_cached_token_s: float
    bend_s: float
    factors: tuple[tuple[float, float], ...] = ()  # by rows, ascending: measured over curve

    def __call__(self, rows: float, context: float) -> float:
        """Seconds."""
        parts = _features(np.array([rows]), np.array([context]), self.bend, self.knee)[0]
        plain = float(parts @ np.array([self.fixed_s, self.per_row_s, self.per_cached_token_s, self.bend_s]))
        if not self.factors:
            return plain
        at, factors = zip(*self.factors, strict=True)
        return plain * float(np.interp(np.log(rows), np.log(at), factors))


def _features(rows: FloatArray, contexts: FloatArray, bend: Bend, knee: float) -> FloatArray:
    extra = {
        "none": np.zeros_like(rows),
        "knee": np.maximum(rows, knee),
        "saturation": 1 - np.exp(-rows / knee),
    }[bend]
    return np.stack([np.ones_like(rows), rows, rows * contexts, extra], axis=1)


def nonnegative(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Least squares with coefficients >= 0: the best of all sets of columns whose plain solution is not negative."""
    columns = [column for column in range(matrix.shape[1]) if matrix[:, column].any()]
    best, least = np.zeros(matrix.shape[1]), float(values @ values)
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = matrix[:, chosen]
            solution = np.linalg.lstsq(part, values, rcond=None)[0]
            if (solution < 0).any():
                continue
            rest = values - part @ solution
            if float(rest @ rest) < least * (1 - 1e-12):
                least = float(rest @ rest)
                best = np.zeros(matrix.shape[1])
                best[list(chosen)] = solution
    return best


def solve(points: Sequence[Point] | FloatArray, bend: Bend, knee: float) -> Curve:
    """The curve of a given form through the points; the work of ``fit_curve`` without the choice of a form."""
    plain = _solve(np.asarray(points, dtype=np.float64), bend, knee)
    ratios: dict[float, list[float]] = {}
    for rows, context, seconds in points:
        ratios.setdefault(float(rows), []).append(float(seconds) / max(plain(rows, context), 1e-12))
    if len(ratios) < MIN_BATCHES_TO_CORRECT:
        return plain
    return replace(plain, factors=tuple((rows, float(np.median(found))) for rows, found in sorted(ratios.items())))


def _solve(points: FloatArray, bend: Bend, knee: float) -> Curve:
    rows, contexts, seconds = points.T
    matrix = _features(rows, contexts, bend, knee)
    if len(np.unique(contexts)) == 1:
        matrix[:, 2] = 0.0  # rows and rows x context can't be told apart
    # Errors count relative to the time: a small batch matters as much as a large one.
    solution = nonnegative(matrix / seconds[:, None], np.ones_like(seconds))
    return Curve(
        bend=bend,
        knee=knee,
        fixed_s=float(solution[0]),
        per_row_s=float(solution[1]),
        per_cached_token_s=float(solution[2]),
        bend_s=float(solution[3]),
    )


def fit_curve(points: Sequence[Point]) -> Curve:
    """The curve through (rows, context, seconds) points whose form predicts left-out batches best.

    Raises:
        InvalidInput: there are fewer than three batch sizes, or a time is not above 0.
    """
    values = np.array(points, dtype=np.float64)
    batches = np.unique(values[:, 0]) if len(points) else np.array([])
    if len(batches) < MIN_BATCHES:
        raise InvalidInput(f"a fit needs {MIN_BATCHES} batch sizes, has {len(batches)}", "input")
    if not (values[:, 2] > 0).all():
        raise InvalidInput("a fit needs times above 0", "input")
    forms: list[tuple[Bend, float]] = [("none", 1.0)]
    if len(batches) > MIN_BATCHES:  # a bend takes a further batch to tell from chance
        inside = [knee for knee in KNEES if batches[0] < knee < batches[-1]]
        forms += [(bend, knee) for bend in ("knee", "saturation") for knee in inside]

    def left_out_error(form: tuple[Bend, float]) -> float:
        errors = []
        for batch in batches[1:-1]:  # the ends would be extrapolated
            curve = solve(values[values[:, 0] != batch], *form)
            errors += [abs(curve(r, c) / s - 1) for r, c, s in values[values[:, 0] == batch]]
        return float(np.mean(errors))

    return solve(values, *min(forms, key=left_out_error))
