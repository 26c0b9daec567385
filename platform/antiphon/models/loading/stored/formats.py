"""Which way a named weight is stored, and reading it whatever the way (control speed).

Must not know: what a weight is for.
"""

from __future__ import annotations

import torch

from antiphon.models.loading.block_scales import is_scaled, read_scaled
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.four_bit import FourBit
from antiphon.models.loading.stored.lines import is_line, line_shape, read_line
from antiphon.models.loading.stored.packed import is_packed, packed_shape, read_packed
from antiphon.models.loading.stored.scaled import has_output_scale, read_by_output

_BESIDE = (
    *(".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
    *(".weight_scale_inv", ".weight_least", ".input_scale", "_scales"),
)
Span = tuple[int, int] | None


def is_four_bit(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the matrix ``name`` is stored in four bits."""
    return is_packed(checkpoint, name) or is_line(checkpoint, name)


def read_four_bit(checkpoint: Checkpoint, name: str, rows: Span, cols: Span) -> FourBit:
    """The matrix ``name``, or some outputs and inputs of it, as it is stored.

    Raises:
        CheckpointInvalid: a tensor that the format needs is missing, or has another shape.
    """
    if is_line(checkpoint, name):
        return read_line(checkpoint, name, rows, cols)
    return read_packed(checkpoint, name, rows, cols)


def is_stored(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor ``name`` has to be worked out from what is stored."""
    if is_four_bit(checkpoint, name) or has_output_scale(checkpoint, name):
        return True
    return name in checkpoint.names and is_scaled(checkpoint, name)


def read_stored(checkpoint: Checkpoint, name: str, rows: Span, cols: Span, dtype: torch.dtype) -> torch.Tensor:
    """Its values, or those of some outputs and inputs.

    Raises:
        CheckpointInvalid: a tensor that the format needs is missing, or has another shape.
    """
    if is_four_bit(checkpoint, name):
        return read_four_bit(checkpoint, name, rows, cols).values(dtype)
    if has_output_scale(checkpoint, name):
        return read_by_output(checkpoint, name, rows, cols, dtype)
    return read_scaled(checkpoint, name, rows, cols, dtype)


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of what ``name`` stands for. Raises CheckpointInvalid."""
    if is_line(checkpoint, name):
        return line_shape(checkpoint, name)
    return packed_shape(checkpoint, name) if is_packed(checkpoint, name) else checkpoint.shape(name)


def stands_for(name: str) -> str | None:
    """The weight that a stored tensor is of; None for what only goes with one: scales, zero points, orders."""
    if name.endswith(_BESIDE):
        return None
    for suffix in (".qweight", ".weight_packed", ".weight_codes"):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return name
