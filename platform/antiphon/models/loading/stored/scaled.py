"""Weights of eight bits with a scale per output or per tensor, as compressed-tensors writes them (control speed).

``W.weight`` (float8 or int8) times ``W.weight_scale``, rounded to the scale's format; activations are not rounded. Must not know:
what a weight is for.
"""

from __future__ import annotations

import torch

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.checkpoint import Checkpoint

Span = tuple[int, int] | None


def has_output_scale(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the matrix ``name`` is stored this way."""
    return name.endswith(".weight") and name in checkpoint.names and name + "_scale" in checkpoint.names


def read_by_output(checkpoint: Checkpoint, name: str, rows: Span, cols: Span, dtype: torch.dtype) -> torch.Tensor:
    """Its values, or those of some outputs and inputs.

    Raises:
        CheckpointInvalid: there are not as many scales as outputs, or zero points.
    """
    num_outputs = checkpoint.shape(name)[0]
    scale = checkpoint.tensor(name + "_scale").reshape(-1, 1)
    if scale.shape[0] not in (1, num_outputs) or name + "_zero_point" in checkpoint.names:
        raise CheckpointInvalid(f"{checkpoint.path}: {name!r} needs one scale an output, or one of all, and no zero points")
    if rows is not None and scale.shape[0] > 1:
        scale = scale[rows[0] : rows[1]]
    values = checkpoint.tensor(name, rows=rows, cols=cols, dtype=torch.float32)
    return values.mul_(scale.float()).to(scale.dtype).to(dtype)
