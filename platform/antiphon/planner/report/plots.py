"""Pictures of a plan as SVG text: cost against context, TPOT against throughput, the pipeline (control speed).

Text and axes take the page's colour, so that one picture reads on light and dark. Must not know: pages or terminals.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.planner.pipeline.ubatches import PipelineRun

INK = "#010203"  # replaced by currentColor
# Mid-tones that keep a contrast of 3:1 against white and against near-black.
COLOURS = ("#2f7fd0", "#d0662f", "#2f9e62", "#a45cc4", "#b8860b", "#c04a78", "#4f8f96", "#8a6d5c")
STAGE_ROWS = (("attention", "A"), ("a2f", "A2F"), ("ffn", "F"), ("f2a", "F2A"))


def _figure(width: float, height: float, name: str) -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInput("pictures need matplotlib: pip install 'antiphon[plan]'", "html") from error

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.grid(visible=True, color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any, name: str, title: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _legend(axes: Any, **options: Any) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


def cost_against_context(contexts: Sequence[int], usd: Mapping[str, Sequence[float]], title: str) -> str:
    """US dollars per million tokens by deployment, over decode contexts."""
    figure, axes = _figure(7.2, 3.8, "cost")
    for (label, values), colour in zip(usd.items(), COLOURS, strict=False):
        style = "-" if label.startswith("AFD") else "--"
        axes.plot(contexts, values, style, marker="o", markersize=4, color=colour, label=label, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(contexts))
    axes.set_xticklabels([f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decode context (tokens)", color=INK)
    axes.set_ylabel("USD per million tokens", color=INK)
    _legend(axes)
    return _svg(figure, "cost", title)


def pareto(
    frontiers: Mapping[str, Sequence[tuple[float, float]]],
    target_s: float | None,
    chosen: tuple[float, float] | None,
    measure: str,
) -> str:
    """Throughput, in ``measure``, against TPOT; one line a wiring."""
    figure, axes = _figure(7.2, 3.8, "pareto")
    for (label, points), colour in zip(frontiers.items(), COLOURS, strict=False):
        if points:
            axes.plot(
                [1e3 * s for s, _ in points],
                [rate for _, rate in points],
                marker="o",
                markersize=5,
                linewidth=2,
                color=colour,
                label=label,
            )
    if target_s is not None:
        axes.axvline(1e3 * target_s, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            "TPOT target",
            (1e3 * target_s, 0.02),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(4, 0),
            color=INK,
        )
    if chosen is not None:
        axes.plot(
            [1e3 * chosen[0]], [chosen[1]], marker="o", markersize=13, fillstyle="none", color=INK, linestyle="none",
            label="chosen",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("TPOT (ms)", color=INK)
    axes.set_ylabel(measure, color=INK)
    _legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure, "pareto", f"TPOT against {measure}")


def gantt(run: PipelineRun, num_layers: int, num_ubatches: int) -> str:
    """The first layers of a step: which ubatch is in which stage when."""
    figure, axes = _figure(8.6, 2.7, "gantt")
    shown = [s for s in run.segments if s.worker == 0 and s.layer < num_layers]
    rows = {stage: index for index, (stage, _) in enumerate(STAGE_ROWS)}
    for segment in shown:
        width = 1e6 * (segment.end_s - segment.start_s)
        axes.barh(
            rows[segment.stage],
            width,
            left=1e6 * segment.start_s,
            height=0.72,
            color=COLOURS[segment.ubatch % len(COLOURS)],
            alpha=0.95 if segment.layer % 2 == 0 else 0.6,
            label=f"ubatch {segment.ubatch}" if segment.layer == 0 and segment.stage == "attention" else None,
        )
    end = 1e6 * max((s.end_s for s in shown), default=0.0)
    axes.set_xlim(0, end)
    axes.set_yticks(range(len(STAGE_ROWS)), [label for _, label in STAGE_ROWS])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("microseconds; the shade alternates with the layer", color=INK)
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(num_ubatches, 6))
    return _svg(figure, "gantt", "Pipeline of the first layers of a decode step")
