"""What judging found, as one report: JSON, tables and plots for people, and the release gate over it (control speed, offline).

Must not know: how figures are computed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antiphon.coe import judge
from antiphon.coe.fit import Recipe
from antiphon.coe.judge import Estimate, Judged, Say, TwoModels, Verdict
from antiphon.coe.train import Prepared
from antiphon.core.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Figures of one recipe on one table. Scores are 0..1; every figure is of rows that nothing was fitted on."""

    table: dict[str, Any]
    scores: dict[str, float]  # router, best single, oracle and baselines
    over_best_single: Estimate
    cost_at_single_quality: float | None  # least average cost whose score is no less than the best single expert's
    single_cost: float
    cost_unit: str
    curve: tuple[judge.CurvePoint, ...]
    aiq: float
    left_out: Estimate | None  # against the best single expert, each dataset unseen
    left_out_by_dataset: dict[str, float]
    gate_rate: float
    gate_rate_left_out: float | None
    slow_rate: float
    agreement: dict[str, Estimate]  # same expert under each perturbation
    category_accuracy: float
    calibration_error: float
    two_models: TwoModels | None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def judge_table(prepared: Prepared, recipe: Recipe, say: Say) -> tuple[Report, Judged]:
    """Cross-validate by prompt, then by dataset; the second value holds the rows, for plots."""
    table, costs_M = prepared.table, prepared.table.params_b
    judged = judge.by_prompt(prepared, recipe, say)
    verdict = judged.verdict
    left = judge.by_dataset(prepared, recipe, say)
    labelled = judged.true_category_B >= 0
    right = verdict.category_B[labelled] == judged.true_category_B[labelled]
    single = float(verdict.single_B.mean())
    at_quality = [point.avg_cost for point in judged.curve if point.score >= single]
    best = int(table.scores.mean(axis=0).argmax())
    report = Report(
        table={
            "prompts": len(table),
            "datasets": len(set(table.datasets)),
            "experts": [expert.name for expert in table.experts],
            "categories": list(prepared.labels.categories),
            "labels": prepared.labels.how,
            "embedder": prepared.embedder,
        },
        scores={
            "router": float(verdict.score_B.mean()),
            "best single": single,
            "oracle": float(table.scores.max(axis=1).mean()),
            **{name: float(values.mean()) for name, values in judged.baselines.items()},
        },
        over_best_single=judge.estimate(verdict.score_B - verdict.single_B, recipe.seed),
        cost_at_single_quality=min(at_quality) if at_quality else None,
        single_cost=float(costs_M[best]),
        cost_unit="1e9 active parameters" if table.has_params else "experts, each 1",
        curve=judged.curve,
        aiq=judge.aiq([(point.avg_cost, point.score) for point in judged.curve]),
        left_out=None if left is None else judge.estimate(left.score_B - left.single_B, recipe.seed),
        left_out_by_dataset={} if left is None else _by_dataset(prepared, left),
        gate_rate=float(verdict.gated_B.mean()),
        gate_rate_left_out=None if left is None else float(left.gated_B.mean()),
        slow_rate=float(verdict.slow_B.mean()),
        agreement=judged.agreement,
        category_accuracy=float(right.mean()),
        calibration_error=judge.calibration_error(verdict.confidence_B[labelled], right),
        two_models=_two_models(prepared, recipe),
    )
    return report, judged


def _by_dataset(prepared: Prepared, left: Verdict) -> dict[str, float]:
    names = sorted(set(prepared.fast.datasets.tolist()))
    gain = left.score_B - left.single_B
    return {name: float(gain[prepared.fast.datasets == name].mean()) for name in names}


def _two_models(prepared: Prepared, recipe: Recipe) -> TwoModels | None:
    if prepared.table.scores.shape[1] != 2:
        return None
    strong = int(prepared.table.scores.mean(axis=0).argmax())
    gain_B = judge.advantages(prepared, recipe, 1 - strong, strong)
    return judge.two_models(gain_B, prepared.table.scores, 1 - strong, strong)


def broken_promises(report: Mapping[str, Any], promises_file: Path) -> list[str]:
    """Promises of a file that the report breaks.

    The file is JSON, ``{"path.of.a.figure": {"min"?: number, "max"?: number}}``; a path names keys of the report, by dots.

    Raises:
        InvalidInput: the file is no such file, or names a figure that the report doesn't have.
    """
    try:
        promises = json.loads(promises_file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"gate file {promises_file} can't be read: {error}", "gate") from error
    if not isinstance(promises, dict):
        raise InvalidInput(f"gate file {promises_file}: expected an object", "gate")
    broken = []
    for path, bounds in promises.items():
        if not isinstance(bounds, dict) or not bounds or not bounds.keys() <= {"min", "max"}:
            raise InvalidInput(f"gate file {promises_file}: {path} needs min or max, nothing else", "gate")
        value = _figure(report, path)
        if value is None:
            broken.append(f"{path} has no value")
        elif "min" in bounds and value < bounds["min"]:
            broken.append(f"{path} is {value:.4f}, promised at least {bounds['min']}")
        elif "max" in bounds and value > bounds["max"]:
            broken.append(f"{path} is {value:.4f}, promised at most {bounds['max']}")
    return broken


def _figure(report: Mapping[str, Any], path: str) -> float | None:
    value: Any = report
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise InvalidInput(f"the report has no figure {path!r}", "gate")
        value = value[key]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InvalidInput(f"{path!r} of the report is not a number", "gate")
    return value


def rows_for_people(report: Report) -> list[tuple[str, str]]:
    """Name and value of every headline figure."""

    def shown(e: Estimate) -> str:
        return f"{100 * e.mean:+.2f} points [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"

    unit = "B" if "parameters" in report.cost_unit else ""
    at_quality = report.cost_at_single_quality
    rows = [(f"score, {name}", f"{score:.4f}") for name, score in report.scores.items()]
    rows += [
        ("over best single, 5-fold", shown(report.over_best_single)),
        ("cost at best single's quality", "not reached" if at_quality is None else f"{at_quality:.1f}{unit}"),
        ("cost of best single", f"{report.single_cost:.1f}{unit}"),
        ("AIQ", f"{report.aiq:.4f}"),
    ]
    if report.left_out is not None and report.gate_rate_left_out is not None:
        rows.append(("against best single, dataset unseen", shown(report.left_out)))
        rows.append(("gated, dataset unseen", f"{100 * report.gate_rate_left_out:.1f} %"))
    rows += [
        ("gated, 5-fold", f"{100 * report.gate_rate:.1f} %"),
        ("asked the slow path, 5-fold", f"{100 * report.slow_rate:.1f} %"),
        ("category accuracy", f"{report.category_accuracy:.4f}"),
        (f"calibration error, {judge.NUM_BINS} bins", f"{report.calibration_error:.4f}"),
    ]
    rows += [(f"same expert: {name}", f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]") for name, e in report.agreement.items()]
    if report.two_models is not None:
        two = report.two_models
        rows.append(("APGR, CPT(50 %), CPT(80 %)", f"{two.apgr:.3f}, {two.cpt_50:.3f}, {two.cpt_80:.3f}"))
    return rows


def plots(report: Report, judged: Judged, categories: Sequence[str]) -> dict[str, bytes]:
    """PNG files by name: quality against cost, calibration, confusion. Equal figures give equal bytes."""
    from matplotlib.figure import Figure  # imported here: only people who look at plots pay for it

    def png(figure: Figure) -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()

    curve = Figure(figsize=(6, 4), layout="constrained")
    axes = curve.add_subplot()
    axes.plot([p.avg_cost for p in report.curve], [p.score for p in report.curve], marker="o", label="router")
    axes.scatter([report.single_cost], [report.scores["best single"]], marker="*", s=140, color="black", label="best single")
    axes.axhline(report.scores["best single"], color="grey", linewidth=0.7)
    axes.set_xlabel(f"average cost ({report.cost_unit})")
    axes.set_ylabel("mean score, rows unseen")
    axes.legend()
    calibration = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = calibration.add_subplot()
    labelled = judged.true_category_B >= 0
    confidence = judged.verdict.confidence_B[labelled]
    right = judged.verdict.category_B[labelled] == judged.true_category_B[labelled]
    bins = np.minimum((confidence * judge.NUM_BINS).astype(int), judge.NUM_BINS - 1)
    filled = [b for b in range(judge.NUM_BINS) if (bins == b).any()]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.7)
    axes.plot([confidence[bins == b].mean() for b in filled], [right[bins == b].mean() for b in filled], marker="o")
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right, rows unseen")
    confusion = Figure(figsize=(1.8 + 0.55 * len(categories), 1.6 + 0.5 * len(categories)), layout="constrained")
    axes = confusion.add_subplot()
    counts = np.zeros((len(categories), len(categories)))
    np.add.at(counts, (judged.true_category_B[labelled], judged.verdict.category_B[labelled]), 1)
    axes.imshow(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)), vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(categories)), categories, rotation=60, ha="right")
    axes.set_yticks(range(len(categories)), categories)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    return {"quality-cost.png": png(curve), "calibration.png": png(calibration), "confusion.png": png(confusion)}
