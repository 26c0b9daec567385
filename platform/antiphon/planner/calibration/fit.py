"""Fits stage and step times to what ``antiphon bench`` measured, and holds predictions against measurements (control speed).

Input is JSON lines, one decode measurement each; other lines and fields are skipped:

    model, wiring, batch, context, decode_step_s                     needed
    t_attention_s, t_ffn_s, t_transfer_s                             optional: one layer and one ubatch; transfer is one way
    num_layers, num_ubatches, rows, threads                          optional: with the stage times

Stages are fitted by rows of a ubatch, and put together again by the pipeline's arithmetic; ``curves`` has the form of a time.
Must not know: what runs the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.planner.bounds import count, number, parse_json, read_text
from antiphon.planner.calibration.curves import MIN_BATCHES, Curve, Point, fit_curve, solve
from antiphon.planner.pipeline.ubatches import StageTimes, step_s


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
    found = []
    for at, line in enumerate(read_text(path, "input").splitlines(), start=1):
        if not line.strip():
            continue
        raw = parse_json(line, f"{path}, line {at}", "input")
        if not isinstance(raw, dict):
            raise InvalidInput(f"{path}, line {at}: is no JSON object", "input")
        if raw.get("decode_step_s") is None:
            continue
        found.append(_measurement(raw, f"{path}, line {at}"))
    if not found:
        raise InvalidInput(f"{path}: has no decode measurement (a line with decode_step_s)", "input")
    return found


def _measurement(raw: dict[str, Any], where: str) -> Measurement:
    for name in ("model", "wiring", "batch", "context"):
        if raw.get(name) is None:
            raise InvalidInput(f"{where}: has no {name}", "input")

    def seconds(name: str) -> float | None:
        return None if raw.get(name) is None else number(raw[name], "stage_s", f"{where}, {name}")

    def whole(name: str) -> int | None:
        return None if raw.get(name) is None else count(raw[name], name, f"{where}, {name}")

    return Measurement(
        model=str(raw["model"]),
        wiring=str(raw["wiring"]),
        batch=count(raw["batch"], "batch", f"{where}, batch"),
        context=number(raw["context"], "context", f"{where}, context"),
        decode_step_s=number(raw["decode_step_s"], "step_s", f"{where}, decode_step_s"),
        t_attention_s=seconds("t_attention_s"),
        t_ffn_s=seconds("t_ffn_s"),
        t_transfer_s=seconds("t_transfer_s"),
        num_layers=whole("num_layers"),
        num_ubatches=1 if raw.get("num_ubatches") in (None, 0) else whole("num_ubatches") or 1,
        rows=None if raw.get("rows") is None else number(raw["rows"], "rows", f"{where}, rows"),
        threads=whole("threads"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedWiring:
    """One model in one wiring: its step, and its stages where they were measured."""

    model: str
    wiring: str
    threads: int | None
    num_layers: int
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

    def predict_s(self, batch: int, context: float, num_ubatches: int = 1) -> float:
        """Seconds of a decode step of ``batch`` rows, cut into ``num_ubatches``."""
        stages = self.stages(batch / num_ubatches, context)
        if stages is None or self.rest is None:
            return self.step(batch, context)
        return _layers_s(self.wiring, stages, self.num_layers, num_ubatches) + self.rest(batch, context)


def _layers_s(wiring: str, stages: StageTimes, num_layers: int, num_ubatches: int) -> float:
    if wiring == "monolith":
        return num_layers * num_ubatches * (stages.attention_s + stages.ffn_s)
    return step_s([(stages, num_layers)], num_ubatches)


def fit(measurements: Iterable[Measurement]) -> list[FittedWiring]:
    """Fit every (model, wiring, threads) by itself; steps may be cut into different numbers of ubatches.

    Raises:
        InvalidInput: see ``fit_curve``; the message names the model and wiring.
    """
    groups: dict[_Key, list[Measurement]] = {}
    for point in measurements:
        groups.setdefault(_key(point), []).append(point)
    fitted = []
    for (model, wiring, _), points in sorted(groups.items(), key=lambda item: str(item[0])):
        try:
            fitted.append(_fit_one(points))
        except InvalidInput as error:
            raise InvalidInput(f"{model}, {wiring}: {error}", error.field) from error
    return fitted


_Key = tuple[str, str, int | None]
_Refit = Callable[[Sequence[Point], str], Curve]


def _key(point: Measurement) -> _Key:
    return point.model, point.wiring, point.threads


def _fit_one(points: Sequence[Measurement]) -> FittedWiring:
    by_step = _whole_step(points, lambda found, _: fit_curve(found))
    if not all(point.has_stages for point in points):
        return by_step
    by_stages = _by_stages(points, lambda found, _: fit_curve(found))
    # Stage times that don't add up to the step (they overlap, or were measured apart) predict worse than the step itself: each
    # way predicts every batch without having seen it, with the form it has chosen already.
    batches = sorted({point.batch for point in points})
    errors: dict[str, list[float]] = {"step": [], "stages": []}
    for batch in batches[1:-1]:  # the ends would be extrapolated
        seen = [point for point in points if point.batch != batch]
        if len({point.batch for point in seen}) < MIN_BATCHES:
            break
        ways = _whole_step(seen, _again(by_step)), _by_stages(seen, _again(by_stages))
        for way, kept in zip(ways, (errors["step"], errors["stages"]), strict=True):
            kept.append(worst_error(way, [point for point in points if point.batch == batch]))
    if errors["step"] and sum(errors["stages"]) <= max(1.1 * sum(errors["step"]), 0.02 * len(batches)):
        return by_stages
    return replace(by_stages, rest=None)  # the stage curves are kept to be looked at


def _again(fitted: FittedWiring) -> _Refit:
    """Refits a curve in the form that ``fitted`` has for it."""

    def refit(points: Sequence[Point], name: str) -> Curve:
        curve: Curve = getattr(fitted, name)
        return solve(points, curve.bend, curve.knee)

    return refit


def _whole_step(points: Sequence[Measurement], refit: _Refit) -> FittedWiring:
    return FittedWiring(
        model=points[0].model,
        wiring=points[0].wiring,
        threads=points[0].threads,
        num_layers=points[0].num_layers or 0,
        step=refit([(p.batch, p.context, p.decode_step_s) for p in points], "step"),
    )


def _by_stages(points: Sequence[Measurement], refit: _Refit) -> FittedWiring:
    curves = {
        name: refit([(p.rows_per_ubatch, p.context, max(getattr(p, f"t_{name}_s"), 1e-9)) for p in points], name)
        for name in ("attention", "ffn", "transfer")
    }
    plain = _whole_step(points, refit)
    rests = []
    for p in points:
        stages = StageTimes(
            attention_s=p.t_attention_s or 0.0, a2f_s=p.t_transfer_s or 0.0, ffn_s=p.t_ffn_s or 0.0, f2a_s=p.t_transfer_s or 0.0
        )
        layers_s = _layers_s(p.wiring, stages, plain.num_layers, p.num_ubatches)
        rests.append((float(p.batch), p.context, max(p.decode_step_s - layers_s, 1e-3 * p.decode_step_s)))
    return replace(plain, rest=refit(rests, "rest"), attention=curves["attention"], ffn=curves["ffn"], transfer=curves["transfer"])


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
    return max(abs(fitted.predict_s(p.batch, p.context, p.num_ubatches) / p.decode_step_s - 1) for p in points)


def calibrate(
    measurements: Sequence[Measurement], held_out: frozenset[int] = frozenset()
) -> tuple[list[FittedWiring], list[Comparison]]:
    """Fit to all batches but the held-out ones, and compare with all.

    Raises:
        InvalidInput: what is left does not suffice for a fit.
    """
    fitted = fit([point for point in measurements if point.batch not in held_out])
    by_key = {(one.model, one.wiring, one.threads): one for one in fitted}
    comparisons = []
    for point in measurements:
        found = by_key.get(_key(point))
        predicted = math.nan if found is None else found.predict_s(point.batch, point.context, point.num_ubatches)
        comparisons.append(Comparison(measurement=point, predicted_s=predicted, held_out=point.batch in held_out))
    return fitted, comparisons
