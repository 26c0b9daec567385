"""What judging found, as one report: JSON, tables and plots for people, and the release gate over it (control speed, offline).

Must not know: how figures are computed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from antiphon.coe.judging import judge
from antiphon.coe.judging.comparisons import COMPARISONS, SIMPLE
from antiphon.coe.judging.judge import Estimate, Judged, Say, TwoModels, Verdict
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Prepared
from antiphon.core.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFigures:
    """One policy on rows that nothing was fitted on."""

    score: float
    avg_cost: float
    over_single: Estimate
    over: dict[str, Estimate]  # against each comparison, row by row
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
    scores: dict[str, float]  # router, best single, oracle and baselines
    experts: dict[str, tuple[float, float]]  # each expert alone: cost, score
    over_best_single: Estimate
    cost_at_single_quality: float | None  # least average cost whose score is no less than the best single expert's
    single_cost: float
    cost_unit: str
    curve: tuple[judge.CurvePoint, ...]
    aiq: float
    left_out: Estimate | None  # against the best single expert, each dataset unseen
    left_out_by_dataset: dict[str, float]
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
            **{name: float(values.mean()) for name, values in verdict.comparisons.items()},
        },
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
        left_out_by_dataset={} if left is None else _by_dataset(prepared, left),
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
    )
    return report, judged


def _by_dataset(prepared: Prepared, left: Verdict) -> dict[str, float]:
    names = sorted(set(prepared.fast.datasets.tolist()))
    gain = left.score_B - left.single_B
    return {name: float(gain[prepared.fast.datasets == name].mean()) for name in names}


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

    unit = "B" if "parameters" in report.cost_unit else ""
    at_quality = report.cost_at_single_quality
    rows = [(f"score, {name}", f"{score:.4f}") for name, score in report.scores.items()]
    rows += [
        ("over best single, 5-fold", _points(report.over_best_single)),
        ("cost at best single's quality", "not reached" if at_quality is None else f"{at_quality:.1f}{unit}"),
        ("cost of best single", f"{report.single_cost:.1f}{unit}"),
        ("AIQ", f"{report.aiq:.4f}"),
    ]
    if report.left_out is not None and report.gate_rate_left_out is not None:
        rows.append(("against best single, dataset unseen", _points(report.left_out)))
        rows.append(("gated, dataset unseen", f"{100 * report.gate_rate_left_out:.1f} %"))
    rows += [
        ("gated, 5-fold", f"{100 * report.gate_rate:.1f} %"),
        ("asked the slow path, 5-fold", f"{100 * report.slow_rate:.1f} %"),
        ("category accuracy", f"{report.category_accuracy:.4f}"),
        (f"calibration error, {judge.NUM_BINS} bins", f"{report.calibration_error:.4f}"),
    ]
    rows += [(f"same expert: {name}", f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]") for name, e in report.agreement.items()]
    rows += [
        (f"APGR, CPT(50 %), CPT(80 %): {name}", f"{two.apgr:.3f}, {two.cpt_50:.3f}, {two.cpt_80:.3f}")
        for name, two in report.two_models.items()
    ]
    rows.append(("expected of its picks, five folds", f"{report.expected:.4f}, scored {report.scores['router']:.4f}"))
    if report.expected_left_out is not None and report.score_left_out is not None:
        rows.append(
            ("expected of its picks, dataset unseen", f"{report.expected_left_out:.4f}, scored {report.score_left_out:.4f}")
        )
    return rows


Rows = list[tuple[str, ...]]


def policy_rows(report: Report) -> Rows:
    """A head, then a line per policy and way of judging: score, cost, and the differences to what it is compared with.

    Comparisons route without cost but in the last two columns, where the simple router has the same policy.
    """
    others = [SIMPLE, *(name for name in report.scores if name in COMPARISONS and name != SIMPLE)]
    alike = (f"− {SIMPLE}, same policy", "less its cost")
    rows: Rows = [("policy", "judged by", "score", "cost", "− best single", *(f"− {name}" for name in others), *alike)]
    for how, policies in (("five folds", report.policies), ("dataset unseen", report.policies_left_out)):
        for name, found in policies.items():
            differences = (_points(found.over_single), *(_points(found.over[other]) for other in others))
            like = (_points(found.over_simple_alike), _points(found.utility_over_simple_alike))
            rows.append((name, how, f"{found.score:.4f}", f"{found.avg_cost:.1f}", *differences, *like))
    return rows


def dataset_rows(report: Report) -> Rows:
    """A head, then a line per dataset: router, best single expert and simple router, its prompts known in part and not at all."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    head = ("dataset", "prompts", "router", "single", "simple", "unseen: router", "single", "simple")
    rows: Rows = [head]
    for name, found in report.by_dataset.items():
        known = (found.router, found.single, found.simple)
        unseen = (found.left_out, found.left_out_single, found.left_out_simple)
        rows.append((name, str(found.num_rows), *(shown(value) for value in known), *(shown(value) for value in unseen)))
    return rows


def _points(e: Estimate) -> str:
    return f"{100 * e.mean:+.2f} [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"


def plots(report: Report, judged: Judged, categories: Sequence[str]) -> dict[str, bytes]:
    """PNG files by name: quality against cost, calibration, confusion. Equal figures give equal bytes."""

    def png(figure: Figure) -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()

    return {
        "quality-cost.png": png(_quality_cost(report)),
        "calibration.png": png(_calibration(report, judged)),
        "confusion.png": png(_confusion(judged, categories)),
    }


def _quality_cost(report: Report) -> Figure:
    figure = _blank(7.5, 4.8)
    axes = figure.add_subplot()
    alone = sorted(report.experts.values())
    axes.scatter([cost for cost, _ in alone], [score for _, score in alone], color="grey", s=28, label="one expert alone")
    best = max(report.experts, key=lambda name: report.experts[name][1])
    axes.annotate(best, report.experts[best], textcoords="offset points", xytext=(-7, -3), ha="right", fontsize=8, color="dimgrey")
    for name, style in (
        ("oracle", "solid"),
        (SIMPLE, "dotted"),
        ("kNN-100", (0, (1, 3))),
        ("ridge", "dashdot"),
        ("random", "dashed"),
    ):
        axes.axhline(report.scores[name], color="grey", linewidth=0.9, linestyle=style, label=f"{name} {report.scores[name]:.3f}")
    points = sorted({(p.avg_cost, p.score) for p in report.curve})
    axes.plot(
        [cost for cost, _ in points],
        [score for _, score in points],
        marker="o",
        markersize=4,
        label=f"router, best {report.scores['router']:.3f}",
    )
    axes.set_title("Quality against cost, rows unseen")
    axes.set_xlabel(f"average cost ({report.cost_unit})")
    axes.set_ylabel("mean score")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _calibration(report: Report, judged: Judged) -> Figure:
    figure = _blank(5.0, 5.4)
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    labelled = judged.true_category_B >= 0
    confidence = judged.verdict.confidence_B[labelled]
    right = judged.verdict.category_B[labelled] == judged.true_category_B[labelled]
    bins = np.minimum((confidence * judge.NUM_BINS).astype(int), judge.NUM_BINS - 1)
    sizes = np.bincount(bins, minlength=judge.NUM_BINS)
    filled = np.flatnonzero(sizes)
    share = np.array([right[bins == b].mean() for b in filled])
    spread = 1.96 * np.sqrt(np.maximum(share * (1 - share), 0.25 / sizes[filled]) / sizes[filled])
    upper.plot([0, 1], [0, 1], color="grey", linewidth=0.7)
    upper.errorbar([confidence[bins == b].mean() for b in filled], share, yerr=spread, marker="o", markersize=4, capsize=2)
    upper.set_title(f"Calibration of p(category), error {report.calibration_error:.3f}")
    upper.set_ylabel("share right, rows unseen")
    upper.grid(alpha=0.25)
    lower.bar((np.arange(judge.NUM_BINS) + 0.5) / judge.NUM_BINS, sizes, width=0.9 / judge.NUM_BINS, color="grey")
    lower.set_yscale("log")
    lower.set_ylabel("prompts")
    lower.set_xlabel("confidence")
    return figure


def _confusion(judged: Judged, categories: Sequence[str]) -> Figure:
    figure = _blank(2.6 + 0.6 * len(categories), 2.0 + 0.5 * len(categories))
    axes = figure.add_subplot()
    labelled = judged.true_category_B >= 0
    counts = np.zeros((len(categories), len(categories)))
    np.add.at(counts, (judged.true_category_B[labelled], judged.verdict.category_B[labelled]), 1)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        color = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_title("Per cent of each labelled category, rows unseen")
    axes.set_xticks(range(len(categories)), categories, rotation=45, ha="right", rotation_mode="anchor")
    names = [f"{name} ({int(counts[c].sum())})" for c, name in enumerate(categories)]
    axes.set_yticks(range(len(categories)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    return figure


def _blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # imported here: only people who look at plots pay for it

    return Figure(figsize=(width, height), layout="constrained")
