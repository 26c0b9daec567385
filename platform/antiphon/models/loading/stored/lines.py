"""GGUF's 4-bit blocks kept as they are in a converted checkpoint (control speed).

    X.weight_codes    uint8 [O, I/2]      two a byte, the lower half first
    X.weight_scales   fp16 [O, I/32]      a value is code * scale + least, in fp32
    X.weight_least    fp16 [O, I/32]

A block of Q4_1 is a scale, the least value and 32 codes; Q4_0 has 8 as its zero instead of a least value. In both, the first 16
inputs are the lower halves of the bytes. Must not know: GGUF's headers, what a weight is for.
"""

from __future__ import annotations

from typing import Final

import torch

from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.four_bit import FourBit

BLOCK: Final = 32
TYPES: Final = ("Q4_0", "Q4_1")
_PARTS: Final = ("_codes", "_scales", "_least")
Span = tuple[int, int] | None


def lines_of(blocks_OB: torch.Tensor, stored_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and least values of a file's blocks, uint8 [O, bytes]."""
    num_numbers = 1 if stored_type == "Q4_0" else 2
    blocks_OGb = blocks_OB.reshape(len(blocks_OB), -1, 2 * num_numbers + BLOCK // 2)
    numbers_OGn = blocks_OGb[..., : 2 * num_numbers].contiguous().view(torch.float16)
    bytes_OGb = blocks_OGb[..., 2 * num_numbers :]
    codes_OI = torch.cat((bytes_OGb & 15, bytes_OGb >> 4), dim=-1).flatten(1)
    codes_OB = codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4)
    scale_OG = numbers_OGn[..., 0].contiguous()
    return codes_OB, scale_OG, scale_OG * -8 if num_numbers == 1 else numbers_OGn[..., 1].contiguous()


def line_names(name: str) -> tuple[str, str, str]:
    """What the parts of the matrix ``name`` are called."""
    codes, scales, least = (name + part for part in _PARTS)
    return codes, scales, least


def is_line(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the matrix ``name`` is stored this way."""
    return name + _PARTS[0] in checkpoint.names


def line_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Outputs and inputs. Raises CheckpointInvalid."""
    outputs, num_bytes = checkpoint.shape(name + _PARTS[0])
    return outputs, 2 * num_bytes


def read_line(checkpoint: Checkpoint, name: str, rows: Span, cols: Span) -> FourBit:
    """The matrix ``name``, or some of its outputs and inputs. Raises CheckpointInvalid."""
    codes, scales, least = line_names(name)
    num_outputs, num_inputs = line_shape(checkpoint, name)
    for part in (scales, least):
        checkpoint.expect(part, (num_outputs, num_inputs // BLOCK))
    matrix = FourBit(
        kind="line",
        codes_OB=checkpoint.tensor(codes, rows=rows),
        num_inputs=num_inputs,
        scale_OG=checkpoint.tensor(scales, rows=rows),
        low_OG=checkpoint.tensor(least, rows=rows),
        group_size=BLOCK,
    )
    return matrix if cols is None else matrix.cols(*cols)
