"""Expert load as a heat map, in the terminal and as a picture (control speed). Must not know: where the load came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from antiphon.core.errors import InvalidInput

Rows = Mapping[int, Sequence[int]]  # by layer number on the wire, by expert

_HOTTEST = 8.0  # x mean at which a cell is as hot as it gets: counts beyond differ no more
# From idle to hottest: dark to bright, so that a map without colours still reads.
_SHADES = " ·░▒▓█"
_COLOURS = ("grey30", "blue", "cyan", "green", "yellow", "red")
_STEPS = (0.0, 0.25, 0.75, 1.5, 3.0)  # x mean above which the next shade begins


def read_load(path: Path) -> Rows:
    """Rows by layer and expert from a JSON file: what ``antiphon experts load --out`` writes, or the bare ``rows`` of it.

    Raises:
        InvalidInput: it holds none.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        raw = raw.get("rows", raw)
        rows = {int(layer): [int(count) for count in counts] for layer, counts in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path}: not rows by layer and expert: {error}", "load") from error
    if not rows or not all(rows.values()):
        raise InvalidInput(f"{path}: holds no rows", "load")
    return dict(sorted(rows.items()))


def heat(rows: Rows, width: int) -> RenderableType:
    """One line a layer, one cell an expert (several experts where ``width`` columns are too few), then hottest over mean."""
    most = max((len(counts) for counts in rows.values()), default=1)
    per_cell = max(1, -(-most // max(8, width - 24)))
    lines = [Text("rows by layer and expert, against the layer's mean", style="bold"), _legend(per_cell)]
    for layer, counts in rows.items():
        mean = sum(counts) / len(counts)
        line = Text(f"{layer:>4} │")
        for start in range(0, len(counts), per_cell):
            cell = counts[start : start + per_cell]
            step = _step(max(cell) / mean if mean else 0.0)
            line.append(_SHADES[step], style=_COLOURS[step])
        line.append(f"│ {max(counts) / mean if mean else 1.0:5.2f} x mean")
        lines.append(line)
    return Group(*lines)


def draw(rows: Rows, path: Path) -> None:
    """The same as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    width = max(len(counts) for counts in rows.values())
    shares = [
        [count * len(counts) / max(sum(counts), 1) for count in counts] + [float("nan")] * (width - len(counts))
        for counts in rows.values()
    ]
    hottest = max(max(value for value in line if value == value) for line in shares)
    figure, axes = plt.subplots(figsize=(min(24.0, max(6.0, 1.5 + width * 0.18)), min(20.0, max(2.5, 1.2 + len(rows) * 0.22))))
    image = axes.imshow(
        shares, aspect="auto", cmap="magma", vmin=0.0, vmax=max(1.0, min(hottest, _HOTTEST)), interpolation="nearest"
    )
    axes.set(xlabel="expert", ylabel="layer", title="Expert load by layer: rows over the layer's mean")
    step = max(1, len(rows) // 30)
    axes.set_yticks(range(0, len(rows), step), [str(layer) for layer in list(rows)[::step]])
    figure.colorbar(image, label="x mean", extend="max" if hottest > _HOTTEST else "neither")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _step(share: float) -> int:
    return sum(share > bound for bound in _STEPS)


def _legend(per_cell: int) -> Text:
    text = Text("      ")
    bounds = ("0", *(f"≤ {bound:g}" for bound in _STEPS[1:]), f"> {_STEPS[-1]:g}")
    for shade, colour, bound in zip(_SHADES, _COLOURS, bounds, strict=True):
        text.append(shade, style=colour).append(f" {bound}   ")
    if per_cell > 1:
        text.append(f"the hottest of {per_cell} experts a cell")
    return text
