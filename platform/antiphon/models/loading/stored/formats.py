"""Which way a named weight is stored, and reading it whatever the way (control speed).

Must not know: what a weight is for.
"""

from __future__ import annotations

import torch

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.block_scales import is_scaled, read_scaled
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.four_bit import FourBit

Span = tuple[int, int] | None


def is_four_bit(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the matrix ``name`` is stored in four bits."""
    return False


def read_four_bit(checkpoint: Checkpoint, name: str, rows: Span, cols: Span) -> FourBit:
    """The matrix ``name``, or some outputs and inputs of it, as it is stored.

    Raises:
        CheckpointInvalid: a tensor that the format needs is missing, or has another shape.
    """
    raise CheckpointInvalid(f"{checkpoint.path}: {name!r} is not stored in four bits")


def is_stored(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor ``name`` has to be worked out from what is stored."""
    return is_four_bit(checkpoint, name) or (name in checkpoint.names and is_scaled(checkpoint, name))


def read_stored(checkpoint: Checkpoint, name: str, rows: Span, cols: Span, dtype: torch.dtype) -> torch.Tensor:
    """Its values, or those of some outputs and inputs.

    Raises:
        CheckpointInvalid: a tensor that the format needs is missing, or has another shape.
    """
    if is_four_bit(checkpoint, name):
        return read_four_bit(checkpoint, name, rows, cols).values(dtype)
    return read_scaled(checkpoint, name, rows, cols, dtype)


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of what ``name`` stands for. Raises CheckpointInvalid."""
    return checkpoint.shape(name)
