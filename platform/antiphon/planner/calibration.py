"""Fits stage and step times to what ``antiphon bench`` measured, and holds predictions against measurements (control speed).

Input is JSON lines, one decode measurement each; other lines and fields are skipped:

    model, wiring, batch, context, decode_step_s                     needed
    t_attention_s, t_ffn_s, t_transfer_s                             optional: one layer and one ubatch; transfer is one way
    num_layers, num_ubatches, rows, threads                          optional: with the stage times

A time is fitted as c0 + c1 n + c2 n C + c3 g(n), all c >= 0, n rows, C context; g is a knee max(n, k) (weights are read in any
case, then operations count) or a saturation 1 - exp(-n / k) (experts that a batch touches). Which g and k is chosen by leaving
one batch out at a time. Must not know: what runs the models.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from antiphon.core.errors import InvalidInput
from antiphon.planner.pipeline import FloatArray, StageTimes, step_s

MIN_BATCHES = 3
KNEES = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)

Bend = Literal["none", "knee", "saturation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One decode measurement."""

    model: str
    wiring: str
    batch: int
    context: float
    decode_step_s: float
    t_attention_s: float | None = None
    t_ffn_s: float | None = None
    t_transfer_s: float | None = None
    num_layers: int | None = None
    num_ubatches: int = 1
    rows: float | None = None
    threads: int | None = None

    @property
    def has_stages(self) -> bool:
        """True when every stage was measured."""
        return None not in (self.t_attention_s, self.t_ffn_s, self.t_transfer_s, self.num_layers)

    @property
    def rows_per_ubatch(self) -> float:
        """Rows of one visit to a stage."""
        return self.batch / self.num_ubatches if self.rows is None else self.rows


def read_measurements(path: Path) -> list[Measurement]:
    """Decode measurements of a JSON-lines file.

    Raises:
        InvalidInput: the file can't be read, a line is no JSON object, or a field has the wrong kind of value.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InvalidInput(f"{path}: {error}", "input") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{path}, line {number}: {error}", "input") from error
        if not isinstance(raw, dict):
            raise InvalidInput(f"{path}, line {number}: is no JSON object", "input")
        if raw.get("decode_step_s") is None:
            continue
        found.append(_measurement(raw, f"{path}, line {number}"))
    if not found:
        raise InvalidInput(f"{path}: has no decode measurement (a line with decode_step_s)", "input")
    return found


def _measurement(raw: dict[str, Any], where: str) -> Measurement:
    def number(name: str) -> float | None:
        value = raw.get(name)
        return None if value is None else float(value)

    def count(name: str) -> int | None:
        value = raw.get(name)
        return None if value is None else int(value)

    try:
        return Measurement(
            model=str(raw["model"]),
            wiring=str(raw["wiring"]),
            batch=int(raw["batch"]),
            context=float(raw["context"]),
            decode_step_s=float(raw["decode_step_s"]),
            t_attention_s=number("t_attention_s"),
            t_ffn_s=number("t_ffn_s"),
            t_transfer_s=number("t_transfer_s"),
            num_layers=count("num_layers"),
            num_ubatches=count("num_ubatches") or 1,
            rows=number("rows"),
            threads=count("threads"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: {error!r}", "input") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A fitted time."""

    bend: Bend
    knee: float
    fixed_s: float
    per_row_s: float
    per_cached_token_s: float
    bend_s: float

    def __call__(self, rows: float, context: float) -> float:
        """Seconds."""
        parts = _features(np.array([rows]), np.array([context]), self.bend, self.knee)[0]
        return float(parts @ np.array([self.fixed_s, self.per_row_s, self.per_cached_token_s, self.bend_s]))


def _features(rows: FloatArray, contexts: FloatArray, bend: Bend, knee: float) -> FloatArray:
    extra = {
        "none": np.zeros_like(rows),
        "knee": np.maximum(rows, knee),
        "saturation": 1 - np.exp(-rows / knee),
    }[bend]
    return np.stack([np.ones_like(rows), rows, rows * contexts, extra], axis=1)


def _nonnegative(matrix: FloatArray, values: FloatArray) -> FloatArray:
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


def _solve(points: FloatArray, bend: Bend, knee: float) -> Curve:
    rows, contexts, seconds = points.T
    matrix = _features(rows, contexts, bend, knee)
    if len(np.unique(contexts)) == 1:
        matrix[:, 2] = 0.0  # rows and rows x context can't be told apart
    # Errors count relative to the time: a small batch matters as much as a large one.
    solution = _nonnegative(matrix / seconds[:, None], np.ones_like(seconds))
    return Curve(
        bend=bend,
        knee=knee,
        fixed_s=float(solution[0]),
        per_row_s=float(solution[1]),
        per_cached_token_s=float(solution[2]),
        bend_s=float(solution[3]),
    )


def fit_curve(points: Sequence[tuple[float, float, float]]) -> Curve:
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
            curve = _solve(values[values[:, 0] != batch], *form)
            errors += [abs(curve(r, c) / s - 1) for r, c, s in values[values[:, 0] == batch]]
        return float(np.mean(errors))

    return _solve(values, *min(forms, key=left_out_error))


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedWiring:
    """One model in one wiring: its step, and its stages where they were measured."""

    model: str
    wiring: str
    threads: int | None
    num_layers: int
    num_ubatches: int
    step: Curve
    attention: Curve | None = None
    ffn: Curve | None = None
    transfer: Curve | None = None
    rest: Curve | None = None  # of a step outside the layers: head, sampling, scheduling

    @property
    def method(self) -> str:
        """What predicts: stages through the pipeline, or the step as a whole."""
        return "step" if self.rest is None else "stages"

    def stages(self, rows: float, context: float) -> StageTimes | None:
        """Fitted stage times of one layer and ubatch; None where they weren't measured."""
        if self.attention is None or self.ffn is None or self.transfer is None:
            return None
        transfer_s = self.transfer(rows, context)
        return StageTimes(
            attention_s=self.attention(rows, context),
            a2f_s=transfer_s,
            ffn_s=self.ffn(rows, context),
            f2a_s=transfer_s,
        )

    def predict_s(self, batch: int, context: float) -> float:
        """Seconds of a decode step."""
        stages = self.stages(batch / self.num_ubatches, context)
        if stages is None or self.rest is None:
            return self.step(batch, context)
        return _layers_s(self.wiring, stages, self.num_layers, self.num_ubatches) + self.rest(batch, context)


def _layers_s(wiring: str, stages: StageTimes, num_layers: int, num_ubatches: int) -> float:
    if wiring == "monolith":
        return num_layers * num_ubatches * (stages.attention_s + stages.ffn_s)
    return step_s([(stages, num_layers)], num_ubatches)


def fit(measurements: Iterable[Measurement]) -> list[FittedWiring]:
    """Fit every (model, wiring, threads, ubatches) by itself.

    Raises:
        InvalidInput: see ``fit_curve``; the message names the model and wiring.
    """
    groups: dict[tuple[str, str, int | None, int], list[Measurement]] = {}
    for point in measurements:
        key = (point.model, point.wiring, point.threads, point.num_ubatches)
        groups.setdefault(key, []).append(point)
    fitted = []
    for (model, wiring, threads, num_ubatches), points in sorted(groups.items(), key=lambda item: str(item[0])):
        try:
            fitted.append(_fit_one(model, wiring, threads, num_ubatches, points))
        except InvalidInput as error:
            raise InvalidInput(f"{model}, {wiring}: {error}", error.field) from error
    return fitted


def _fit_one(model: str, wiring: str, threads: int | None, num_ubatches: int, points: Sequence[Measurement]) -> FittedWiring:
    step = fit_curve([(p.batch, p.context, p.decode_step_s) for p in points])
    plain = FittedWiring(
        model=model,
        wiring=wiring,
        threads=threads,
        num_layers=points[0].num_layers or 0,
        num_ubatches=num_ubatches,
        step=step,
    )
    if not all(point.has_stages for point in points):
        return plain
    curves = {
        name: fit_curve([(p.rows_per_ubatch, p.context, max(getattr(p, f"t_{name}_s"), 1e-9)) for p in points])
        for name in ("attention", "ffn", "transfer")
    }
    rests = []
    for p in points:
        stages = StageTimes(
            attention_s=p.t_attention_s or 0.0,
            a2f_s=p.t_transfer_s or 0.0,
            ffn_s=p.t_ffn_s or 0.0,
            f2a_s=p.t_transfer_s or 0.0,
        )
        layers_s = _layers_s(wiring, stages, plain.num_layers, num_ubatches)
        rests.append((float(p.batch), p.context, max(p.decode_step_s - layers_s, 1e-3 * p.decode_step_s)))
    whole = FittedWiring(
        model=model,
        wiring=wiring,
        threads=threads,
        num_layers=plain.num_layers,
        num_ubatches=num_ubatches,
        step=step,
        rest=fit_curve(rests),
        **curves,
    )
    # Stage times that don't add up to the step (they overlap, or were measured apart) predict worse than the step itself.
    by_stages, by_step = (worst_error(f, points) for f in (whole, plain))
    return whole if by_stages <= max(1.5 * by_step, 0.02) else plain_with_stages(plain, whole)


def plain_with_stages(plain: FittedWiring, whole: FittedWiring) -> FittedWiring:
    """The step as a whole predicts; the stage curves are kept to be looked at."""
    return FittedWiring(
        model=plain.model,
        wiring=plain.wiring,
        threads=plain.threads,
        num_layers=plain.num_layers,
        num_ubatches=plain.num_ubatches,
        step=plain.step,
        attention=whole.attention,
        ffn=whole.ffn,
        transfer=whole.transfer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prediction held against a measurement."""

    measurement: Measurement
    predicted_s: float
    held_out: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measurement.decode_step_s - 1


def worst_error(fitted: FittedWiring, points: Sequence[Measurement]) -> float:
    """Largest relative error over the points."""
    return max(abs(fitted.predict_s(p.batch, p.context) / p.decode_step_s - 1) for p in points)


def calibrate(
    measurements: Sequence[Measurement], held_out: frozenset[int] = frozenset()
) -> tuple[list[FittedWiring], list[Comparison]]:
    """Fit to all batches but the held-out ones, and compare with all.

    Raises:
        InvalidInput: what is left does not suffice for a fit.
    """
    fitted = fit([point for point in measurements if point.batch not in held_out])
    by_key = {(f.model, f.wiring, f.threads, f.num_ubatches): f for f in fitted}
    comparisons = []
    for point in measurements:
        found = by_key.get((point.model, point.wiring, point.threads, point.num_ubatches))
        predicted = math.nan if found is None else found.predict_s(point.batch, point.context)
        comparisons.append(Comparison(measurement=point, predicted_s=predicted, held_out=point.batch in held_out))
    return fitted, comparisons
