"""Which layouts of a group to look at: grids over the sizes of its pools, and steps around one (pure arithmetic on integers).

Must not know: what a layout is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from antiphon.planner.pipeline.group import Layout

WHOLE_FACTOR, APART_FACTOR = 1.25, 1.7  # between sizes of a grid
WHOLE_UBATCHES = (1, 2)
APART_UBATCHES = (2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a layout may be."""

    most_cards: int
    least: int  # cards of the FFN (of all, when the same cards do both halves) that hold its weights
    tensors: Sequence[int]  # cards that may share an attention, ascending
    max_ubatches: int

    def hold(self, layout: Layout) -> bool:
        """True when the layout is one."""
        return (
            layout.num_ffn >= self.least
            and layout.num_attention >= layout.tensor
            and layout.num_cards <= self.most_cards
            and layout.tensor in self.tensors
            and 1 <= layout.num_ubatches <= (WHOLE_UBATCHES[-1] if layout.colocated else self.max_ubatches)
        )


def sizes(low: int, high: int, factor: float) -> list[int]:
    """Whole numbers from ``low`` to ``high``, each about ``factor`` times the one before."""
    found, size = [], float(low)
    while size <= high:
        found.append(round(size))
        size = max(size * factor, size + 1)
    if found and found[-1] != high:
        found.append(high)
    return found


def whole(size: int, tensor: int, num_ubatches: int) -> Layout:
    """``size`` cards, less those that make no rank of ``tensor``, that do both halves."""
    cards = size // tensor * tensor
    return Layout(num_attention=cards, num_ffn=cards, num_ubatches=num_ubatches, colocated=True, tensor=tensor)


def whole_grid(bounds: Bounds) -> list[Layout]:
    """Cards that do both halves: over their number, cut into ubatches or not, attention on one card or on the most."""
    return _kept(
        bounds,
        (
            whole(size, tensor, count)
            for size in sizes(bounds.least, bounds.most_cards, WHOLE_FACTOR)
            for tensor in {1, bounds.tensors[-1]}
            for count in WHOLE_UBATCHES
        ),
    )


def apart_grid(bounds: Bounds, tensors: Iterable[int]) -> list[Layout]:
    """Attention and FFN on cards of their own: over both numbers and ubatches."""
    return _kept(
        bounds,
        (
            Layout(num_attention=x // tensor * tensor, num_ffn=y, num_ubatches=count, tensor=tensor)
            for y in sizes(bounds.least, max(1, bounds.most_cards // 2), APART_FACTOR)
            for x in sizes(1, bounds.most_cards - y, APART_FACTOR)
            for tensor in tensors
            for count in APART_UBATCHES
        ),
    )


def near(layout: Layout, bounds: Bounds) -> list[Layout]:
    """Layouts a step away: more or fewer cards of a pool, cards from one pool to the other, other ubatches, another tensor size."""
    x, y, tensor = layout.num_attention, layout.num_ffn, layout.tensor
    found = [replace(layout, num_ubatches=layout.num_ubatches + step) for step in (-1, 1)]
    if layout.colocated:
        found += [whole(x + step * tensor, tensor, layout.num_ubatches) for step in _steps(x // tensor)]
        found += [whole(x, other, layout.num_ubatches) for other in bounds.tensors if other != tensor]
    else:
        found += [replace(layout, num_attention=x + step * tensor) for step in _steps(x // tensor)]
        found += [replace(layout, num_ffn=y + step) for step in _steps(y)]
        found += [replace(layout, num_attention=x + step * tensor, num_ffn=y - step * tensor) for step in _steps(y // tensor)]
        for other in (tensor // 2, tensor * 2):
            found.append(replace(layout, num_attention=x // max(1, other) * other, tensor=other))
    return [one for one in _kept(bounds, found) if one != layout]


def _steps(count: int) -> list[int]:
    ups = {1, 2, max(1, count // 12), max(1, count // 3)}
    return [*(-up for up in ups), *ups]


def _kept(bounds: Bounds, layouts: Iterable[Layout]) -> list[Layout]:
    """Those within the bounds, each once, in an order that doesn't depend on how they were made."""
    kept = {layout for layout in layouts if layout.tensor > 0 and bounds.hold(layout)}
    return sorted(kept, key=lambda one: (one.num_cards, one.name, one.num_ubatches))
