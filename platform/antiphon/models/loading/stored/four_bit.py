"""Weights of four bits an element, as they are kept in memory, and what they stand for (hot where a layer computes with them).

    codes       two a byte, the lower half first, along the inputs
    integer     (code - zero) * scale, rounded to the scale's format          GPTQ, AWQ, compressed-tensors
    line        code * scale + least, in fp32                                 GGUF's Q4_1
    e2m1        value(code) * 2^scale                                         MXFP4 (OCP Microscaling Formats 1.0, §5.3)

A scale is shared by a run of inputs (a group); where a format orders inputs by importance, a table says each input's group.
Must not know: files, formats' names. Legend: O outputs, I inputs, B = I/2 bytes, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

Kind = Literal["integer", "line", "e2m1"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES: dict[Kind, tuple[float, ...]] = {
    "integer": tuple(float(code) for code in range(16)),
    "line": tuple(float(code) for code in range(16)),
    "e2m1": (*_E2M1, *(-value for value in _E2M1)),
}
_PAIRS = {
    kind: torch.tensor([[values[byte & 15], values[byte >> 4]] for byte in range(256)]) for kind, values in _VALUES.items()
}  # fp32 [256, 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """A matrix [O, I]."""

    kind: Kind
    codes_OB: torch.Tensor  # uint8
    num_inputs: int
    scale_OG: torch.Tensor  # integer: of its own format; line: fp16; e2m1: uint8, 127 more than the exponent
    low_OG: torch.Tensor | None = None  # integer: uint8 zeros, None = 8; line: fp16, the least value
    group_size: int  # inputs that share a scale
    group_of_I: torch.Tensor | None = None  # int64; None: runs of ``group_size``

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes_OB.shape[0], self.num_inputs

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        held = (self.codes_OB, self.scale_OG, self.low_OG, self.group_of_I)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, which: slice) -> FourBit:
        """Some outputs, in memory of their own."""
        return replace(
            self,
            codes_OB=self.codes_OB[which].clone(),
            scale_OG=self.scale_OG[which].clone(),
            low_OG=None if self.low_OG is None else self.low_OG[which].clone(),
        )

    def cols(self, low: int, high: int) -> FourBit:
        """Inputs [low, high), in memory of their own."""
        if (low, high) == (0, self.num_inputs):
            return self
        if low % 2 == 0:
            codes_OB = self.codes_OB[:, low // 2 : -(-high // 2)].clone()
        else:
            codes_OB = packed(unpacked(self.codes_OB)[:, low:high])
        if self.group_of_I is not None:
            return replace(self, codes_OB=codes_OB, num_inputs=high - low, group_of_I=self.group_of_I[low:high].clone())
        first, last = low // self.group_size, -(-high // self.group_size)
        part = replace(
            self,
            codes_OB=codes_OB,
            num_inputs=high - low,
            scale_OG=self.scale_OG[:, first:last].clone(),
            low_OG=None if self.low_OG is None else self.low_OG[:, first:last].clone(),
        )
        if low % self.group_size == 0:
            return part
        return replace(part, group_of_I=torch.arange(low, high) // self.group_size - first)

    def values(self, dtype: torch.dtype, first: int = 0, last: int | None = None) -> torch.Tensor:
        """What the matrix stands for, its outputs [first, last): [outputs, I]."""
        codes_RI = F.embedding(self.codes_OB[first:last].int(), _PAIRS[self.kind]).flatten(1)[:, : self.num_inputs]
        scale_RG = self.scale_OG[first:last]
        low_RG = None if self.low_OG is None else self.low_OG[first:last]
        num_rows, num_inputs = codes_RI.shape
        if self.group_of_I is None and num_inputs % self.group_size == 0:
            values = codes_RI.reshape(num_rows, -1, self.group_size)
            scale, low = scale_RG[:, :, None], None if low_RG is None else low_RG[:, :, None]
        else:
            group_I = torch.arange(num_inputs) // self.group_size if self.group_of_I is None else self.group_of_I
            values, scale = codes_RI, scale_RG.index_select(1, group_I)
            low = None if low_RG is None else low_RG.index_select(1, group_I)
        if self.kind == "e2m1":
            values = values * torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        elif self.kind == "line":
            assert low is not None  # whoever makes one gives it
            values = (values * scale.float()).add_(low.float())
        else:
            # Products of codes and 16-bit scales are exact in fp32: one rounding, as if computed in the scale's format.
            values = ((values - (8.0 if low is None else low.float())) * scale.float()).to(scale.dtype)
        return values.reshape(num_rows, num_inputs).to(dtype)


def unpacked(codes_OB: torch.Tensor) -> torch.Tensor:
    """Codes one a byte."""
    return torch.stack((codes_OB & 15, codes_OB >> 4), dim=-1).flatten(-2)


def packed(codes_OI: torch.Tensor) -> torch.Tensor:
    """Codes of one a byte, two a byte; a missing last one is 0."""
    if codes_OI.shape[1] % 2:
        codes_OI = F.pad(codes_OI, (0, 1))
    pairs = codes_OI.to(torch.uint8).reshape(len(codes_OI), -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)
