"""Weights stored in 8-bit floats with a scale per block, as in DeepSeek-V3's checkpoints, read as ordinary ones (control speed).

``W.weight`` (float8 e4m3) has ``W.weight_scale_inv`` beside it, one fp32 factor per block of rows and columns; the weight is their
product (arXiv 2412.19437 §3.3). Activations are not rounded to 8 bits, so results are closer to the unrounded model than those of
programs that do. Must not know: what a tensor is for. Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.loading.checkpoint import Checkpoint

CONFIG_FIELD = "quantization_config"
_SUFFIX = "_scale_inv"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Fields of the config's section, with the values that mean what is computed here.
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", None),  # the scales are powers of two; they are stored all the same
}
# Which tensors are stored as they are shows in their types.
_HARMLESS = frozenset(("modules_to_not_convert", "ignored_layers", "dequantize"))


def check_block_scales(section: Mapping[str, Any]) -> None:
    """Check the section of a config that says how weights are stored.

    Raises:
        UnsupportedModel: names the field that says otherwise.
    """
    for key, value in section.items():
        name = f"{CONFIG_FIELD}.{key}"
        if key in _SUPPORTED and value not in _SUPPORTED[key]:
            raise UnsupportedModel(f"{name} = {value!r} is not supported (only {_SUPPORTED[key][0]!r})", name)
        if key not in _SUPPORTED and key not in _HARMLESS and key != "weight_block_size":
            raise UnsupportedModel(f"{name} = {value!r} is not known: it could change results", name)
    _block_size({CONFIG_FIELD: section})


def is_scaled(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is stored in 8-bit floats."""
    return checkpoint.dtype(name) in _FLOAT8


def read_scaled(
    checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None, cols: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor stored in 8-bit floats, or a part of it, with its scales applied: each product is rounded once, to ``dtype``.

    Raises:
        CheckpointInvalid: it has no scales, or not as many as its shape needs.
        UnsupportedModel: the config does not say how large blocks are.
    """
    shape = checkpoint.shape(name)
    if len(shape) != 2 or name + _SUFFIX not in checkpoint.names:
        raise CheckpointInvalid(f"{checkpoint.path}: tensor {name!r} is stored in 8-bit floats without a scale per block")
    sizes = _block_size(checkpoint.config)
    checkpoint.expect(name + _SUFFIX, (-(-shape[0] // sizes[0]), -(-shape[1] // sizes[1])))
    spans = [(0, size) if span is None else span for size, span in zip(shape, (rows, cols), strict=True)]
    blocks = [(low // size, -(-high // size)) for (low, high), size in zip(spans, sizes, strict=True)]
    scale = checkpoint.tensor(name + _SUFFIX, rows=blocks[0], cols=blocks[1], dtype=torch.float32)
    for dimension, ((low, high), (first, _), size) in enumerate(zip(spans, blocks, sizes, strict=True)):
        which = torch.arange(low, high) // size - first
        scale = scale.index_select(dimension, which)
    weight = checkpoint.tensor(name, rows=rows, cols=cols, dtype=torch.float32)
    return weight.mul_(scale).to(dtype)


def _block_size(raw: Mapping[str, Any]) -> tuple[int, int]:
    size = (raw.get(CONFIG_FIELD) or {}).get("weight_block_size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(each, int) and each > 0 for each in size):
        name = f"{CONFIG_FIELD}.weight_block_size"
        raise UnsupportedModel(f"{name} = {size!r}: expected the rows and columns that share a scale", name)
    return size[0], size[1]
