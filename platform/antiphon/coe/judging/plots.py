"""What judging found as pictures for people (control speed, offline). Must not know: how figures are computed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from antiphon.coe.judging import judge
from antiphon.coe.judging.comparisons import SIMPLE
from antiphon.coe.judging.judge import Judged
from antiphon.coe.judging.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
