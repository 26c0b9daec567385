"""Draws the lines of ``antiphon bench`` (control speed). Must not know: how anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antiphon.core.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]

_STAGES = {"t_attention_s": "attention", "t_transfer_s": "transfer, one way", "t_ffn_s": "FFN"}


def draw(lines: Sequence[Line], path: Path) -> None:
    """Write a picture of all lines that can be drawn: one panel a kind of bench; the file's ending chooses the format.

    Raises:
        InvalidInput: there is no such line, or the format is not known.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    panels = [(name, panel) for name, panel in _PANELS.items() if any(line.get("bench") == name for line in lines)]
    if not panels:
        raise InvalidInput("nothing was measured that could be drawn", "plot")
    count = sum(len(parts) for _, parts in panels)
    figure, axes = plt.subplots(1, count, figsize=(4.8 * count, 4.0), squeeze=False, layout="constrained")
    at = iter(axes[0])
    for name, parts in panels:
        for part in parts:
            axis = next(at)
            part(axis, [line for line in lines if line.get("bench") == name])
            axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise InvalidInput(f"{path}: {error}", "plot") from error
    finally:
        plt.close(figure)


def _links(axis: Axes, lines: Sequence[Line]) -> None:
    for transport, mode in dict.fromkeys((line["transport"], line["mode"]) for line in lines):
        own = sorted(
            (line["num_bytes"], line["median_us"], line["p99_us"])
            for line in lines
            if (line["transport"], line["mode"]) == (transport, mode)
        )
        sizes, medians, worst = zip(*own, strict=True)
        (drawn,) = axis.plot(
            sizes, medians, marker="o", label=f"{transport}, {mode}", linestyle="-" if mode == "in-place" else "--"
        )
        axis.fill_between(sizes, medians, worst, alpha=0.12, color=drawn.get_color())
    axis.set(xscale="log", yscale="log", xlabel="bytes each way", ylabel="round trip, µs: median to 99th percentile", title="links")
    axis.legend(frameon=False, fontsize=7)


def _decode_rate(axis: Axes, lines: Sequence[Line]) -> None:
    for name in _series(lines):
        own = sorted((line["batch"], line["tokens_per_s"]) for line in lines if _name(line) == name)
        axis.plot([batch for batch, _ in own], [rate for _, rate in own], marker="o", label=name)
    axis.set_xticks(sorted({line["batch"] for line in lines}))
    axis.set(xlabel="batch", ylabel="tokens per second", title="decode", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def _decode_stages(axis: Axes, lines: Sequence[Line]) -> None:
    staged = [line for line in lines if "t_attention_s" in line]
    places = [f"{line['wiring']}\nB{line['batch']}" for line in staged]
    below = [0.0] * len(staged)
    for key, label in _STAGES.items():
        heights = [1e6 * line[key] for line in staged]
        axis.bar(range(len(staged)), heights, 0.7, bottom=below, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for place, (line, top) in enumerate(zip(staged, below, strict=True)):
        axis.annotate(f"{100 * line['bubble_share']:.0f} %", (place, top), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(staged)), places, fontsize=7)
    axis.margins(y=0.25)
    axis.set(ylabel="µs per layer and ubatch; above: bubble", title="stages")
    axis.legend(frameon=False, fontsize=8)


def _prefill(axis: Axes, lines: Sequence[Line]) -> None:
    for name in _series(lines):
        own = sorted((line["num_prompt"], line["tokens_per_s"]) for line in lines if _name(line) == name)
        axis.plot([num for num, _ in own], [rate for _, rate in own], marker="o", label=name)
    axis.set(xlabel="prompt tokens", ylabel="tokens per second", title="prefill", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def _mixed(axis: Axes, lines: Sequence[Line]) -> None:
    percents = (50, 90, 99)
    for offset, line in enumerate(lines):
        heights = [1e3 * (line[f"ttft_p{percent}_s"] or 0.0) for percent in percents]
        at = [place + 0.8 * (offset - (len(lines) - 1) / 2) / len(lines) for place in range(len(percents))]
        axis.bar(at, heights, 0.8 / len(lines), label=f"{_name(line)}, {line['rate_per_s']:g}/s")
    axis.set_xticks(range(len(percents)), [f"p{percent}" for percent in percents])
    axis.set(ylabel="time to first token, ms", title="mixed load")
    axis.legend(frameon=False, fontsize=8)


def _name(line: Line) -> str:
    return f"{line['wiring']}, {line['dtype']}"


def _series(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(_name(line) for line in lines))


_PANELS: dict[str, Sequence[Callable[[Axes, Sequence[Line]], None]]] = {
    "link": (_links,),
    "decode": (_decode_rate, _decode_stages),
    "prefill": (_prefill,),
    "mixed": (_mixed,),
}
