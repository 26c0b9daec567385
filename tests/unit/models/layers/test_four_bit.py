"""Layers in four bits: the kernel for few rows against the values themselves, in every kind; many rows go the other way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from antiphon.models.layers.four_bit import _KERNEL_MAX_ROWS, FourBitLinear, _has_kernel
from antiphon.models.loading.stored.four_bit import FourBit, Kind
from antiphon.models.native.library import available

OUTPUTS, INPUTS, GROUP = 37, 96, 32


def matrix(kind: Kind, scale_dtype: torch.dtype, *, has_low: bool) -> FourBit:
    shape = (OUTPUTS, INPUTS // GROUP)
    scale = torch.randint(118, 124, shape, dtype=torch.uint8) if kind == "e2m1" else (torch.rand(shape) * 0.1).to(scale_dtype)
    low = None
    if has_low:
        low = torch.randn(shape).half() if kind == "line" else torch.randint(0, 16, shape, dtype=torch.uint8)
    codes = torch.randint(0, 256, (OUTPUTS, INPUTS // 2), dtype=torch.uint8)
    return FourBit(kind=kind, codes_OB=codes, num_inputs=INPUTS, scale_OG=scale, low_OG=low, group_size=GROUP)


@pytest.mark.parametrize(
    ("kind", "scale_dtype", "has_low"),
    [
        ("integer", torch.float16, True),
        ("integer", torch.bfloat16, False),
        ("integer", torch.float32, True),
        ("line", torch.float16, True),
        ("e2m1", torch.uint8, False),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 7, _KERNEL_MAX_ROWS + 1])
def test_a_layer_computes_with_its_values(
    kind: Kind, scale_dtype: torch.dtype, has_low: bool, dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    torch.manual_seed(0)
    parts = [matrix(kind, scale_dtype, has_low=has_low) for _ in range(2)]
    x, bias = torch.randn(rows, INPUTS).to(dtype), torch.randn(2 * OUTPUTS).to(dtype)
    values = torch.cat([part.values(dtype) for part in parts])
    expected = F.linear(x.double(), values.double(), bias.double())
    got = FourBitLinear(parts, bias)(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def test_the_kernel_takes_groups_that_are_runs() -> None:
    made = matrix("integer", torch.float16, has_low=True)
    assert _has_kernel(made, torch.float32) == available()
    assert not _has_kernel(made.cols(5, 69), torch.float32)  # begins within a group
    assert not _has_kernel(made, torch.float16)
