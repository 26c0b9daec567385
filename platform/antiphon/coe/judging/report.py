"""What judging found, as one report, and the release gate over it (control speed, offline).

Must not know: how figures are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.coe.judging import judge
from antiphon.coe.judging.comparisons import SIMPLE
from antiphon.coe.judging.judge import Estimate, Judged, Say, TwoModels, Verdict
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Prepared
from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFigures:
    """One policy on rows that nothing was fitted on."""

    score: float
    avg_cost: float
    over_single: Estimate
    over: dict[str, Estimate]  # against each comparison and the oracle, row by row
    over_simple_alike: Estimate  # against the simple router under the same policy: the same cost, for the same prompts
    utility_over_simple_alike: Estimate  # the same with the cost deducted on both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFigures:
    """One dataset's rows: mean scores when other prompts of it were learnt from, and when none was."""

    num_rows: int
    router: float
    single: float
    simple: float
    left_out: float | None
    left_out_single: float | None
    left_out_simple: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Figures of one recipe on one table. Scores are 0..1; every figure is of rows that nothing was fitted on."""

    table: dict[str, Any]
    scores: dict[str, float]  # router, best single, oracle and baselines; five folds
    left_out_kind: str | None  # what was left out in turn: dataset, or category where there are too few datasets; None = nothing
    scores_left_out: dict[str, float]  # the same with it left out
    experts: dict[str, tuple[float, float]]  # each expert alone: cost, score
    over_best_single: Estimate
    cost_at_single_quality: float | None  # least average cost whose score is no less than the best single expert's
    single_cost: float
    cost_unit: str
    curve: tuple[judge.CurvePoint, ...]
    aiq: float
    left_out: Estimate | None  # against the best single expert, each dataset (or category) unseen
    left_out_by_dataset: dict[str, float]  # or by category, as left_out_kind says
    policies: dict[str, PolicyFigures]  # five folds
    policies_left_out: dict[str, PolicyFigures]
    by_dataset: dict[str, DatasetFigures]
    expected: float  # what the router expected of its picks, five folds
    expected_left_out: float | None
    score_left_out: float | None
    gate_rate: float
    gate_rate_left_out: float | None
    slow_rate: float
    agreement: dict[str, Estimate]  # same expert under each perturbation
    category_accuracy: float
    calibration_error: float
    two_models: dict[str, TwoModels]  # the router and its comparisons; empty unless there are two experts
    two_models_left_out: dict[str, TwoModels]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def judge_table(prepared: Prepared, recipe: Recipe, say: Say) -> tuple[Report, Judged]:
    """Cross-validate by prompt, then by dataset; the second value holds the rows, for plots."""
    table, costs_M = prepared.table, prepared.table.params_b
    judged = judge.by_prompt(prepared, recipe, say)
    verdict = judged.verdict
    groups = judge.left_out_groups(prepared)
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
        scores=_scores(verdict),
        left_out_kind=None if groups is None else groups[0],
        scores_left_out={} if left is None else _scores(left),
        experts={
            expert.name: (float(cost), float(score))
            for expert, cost, score in zip(table.experts, costs_M, table.scores.mean(axis=0), strict=True)
        },
        over_best_single=judge.estimate(verdict.score_B - verdict.single_B, recipe.seed),
        cost_at_single_quality=min(at_quality) if at_quality else None,
        single_cost=float(costs_M[best]),
        cost_unit="1e9 active parameters" if table.has_params else "experts, each 1",
        curve=judged.curve,
        aiq=judge.aiq([(point.avg_cost, point.score) for point in judged.curve]),
        left_out=None if left is None else judge.estimate(left.score_B - left.single_B, recipe.seed),
        left_out_by_dataset={} if left is None or groups is None else _by_group(groups[1], left),
        policies=_policies(verdict, recipe),
        policies_left_out={} if left is None else _policies(left, recipe),
        by_dataset=_dataset_figures(prepared, verdict, left),
        expected=float(verdict.expected_B.mean()),
        expected_left_out=None if left is None else float(left.expected_B.mean()),
        score_left_out=None if left is None else float(left.score_B.mean()),
        gate_rate=float(verdict.gated_B.mean()),
        gate_rate_left_out=None if left is None else float(left.gated_B.mean()),
        slow_rate=float(verdict.slow_B.mean()),
        agreement=judged.agreement,
        category_accuracy=float(right.mean()),
        calibration_error=judge.calibration_error(verdict.confidence_B[labelled], right),
        two_models=_two_models(prepared, verdict),
        two_models_left_out={} if left is None else _two_models(prepared, left),
    )
    return report, judged


def _scores(verdict: Verdict) -> dict[str, float]:
    compared = {name: float(values_B.mean()) for name, values_B in verdict.comparisons.items()}
    return {"router": float(verdict.score_B.mean()), "best single": float(verdict.single_B.mean()), **compared}


def _by_group(group_B: npt.NDArray[np.str_], left: Verdict) -> dict[str, float]:
    gain_B = left.score_B - left.single_B
    return {name: float(gain_B[group_B == name].mean()) for name in sorted(set(group_B.tolist()))}


def _policies(verdict: Verdict, recipe: Recipe) -> dict[str, PolicyFigures]:
    return {
        name: PolicyFigures(
            score=float(score_B.mean()),
            avg_cost=float(cost_B.mean()),
            over_single=judge.estimate(score_B - verdict.single_B, recipe.seed),
            over={other: judge.estimate(score_B - other_B, recipe.seed) for other, other_B in verdict.comparisons.items()},
            over_simple_alike=judge.estimate(score_B - verdict.simple_policies[name][0], recipe.seed),
            utility_over_simple_alike=judge.estimate(verdict.simple_policies[name][1], recipe.seed),
        )
        for name, (score_B, cost_B) in verdict.policies.items()
    }


def _dataset_figures(prepared: Prepared, verdict: Verdict, left: Verdict | None) -> dict[str, DatasetFigures]:
    figures = {}
    for name in sorted(set(prepared.fast.datasets.tolist())):
        rows = prepared.fast.datasets == name
        figures[name] = DatasetFigures(
            num_rows=int(rows.sum()),
            router=float(verdict.score_B[rows].mean()),
            single=float(verdict.single_B[rows].mean()),
            simple=float(verdict.comparisons[SIMPLE][rows].mean()),
            left_out=None if left is None else float(left.score_B[rows].mean()),
            left_out_single=None if left is None else float(left.single_B[rows].mean()),
            left_out_simple=None if left is None else float(left.comparisons[SIMPLE][rows].mean()),
        )
    return figures


def _two_models(prepared: Prepared, verdict: Verdict) -> dict[str, TwoModels]:
    scores_BM = prepared.table.scores
    if scores_BM.shape[1] != 2:
        return {}
    strong = int(scores_BM.mean(axis=0).argmax())
    by_name = {"router": verdict.advantage_B, **verdict.comparison_advantages}
    return {name: judge.two_models(gain_B, scores_BM, 1 - strong, strong) for name, gain_B in by_name.items()}


def broken_promises(report: Mapping[str, Any], promises_file: Path) -> list[str]:
    """Promises of a file that the report breaks.

    The file is JSON, ``{"path.of.a.figure": {"min"?: number, "max"?: number}}``; a path names keys of the report, by dots.

    Raises:
        InvalidInput: the file is no such file, or names a figure that the report doesn't have.
    """
    try:
        promises = read_json_text(promises_file.read_bytes(), unique_keys=True)
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
