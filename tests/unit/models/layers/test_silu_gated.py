"""A gated FFN's first half: one call gives what product and activation give one after the other, whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.layers.functional import gated
from antiphon.models.layers.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 40), (3072, 576), (128, 1100), (80, 48)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_and_up_in_one_call_are_those_of_two(dtype: torch.dtype, outputs: int, inputs: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    bias_O = torch.randn(outputs).to(dtype) if with_bias else None
    linear = Linear((torch.randn(outputs, inputs) * 0.1).to(dtype), bias_O)
    for num_rows in (1, 9, 64, 300):
        x_TI = torch.randn(num_rows, inputs).to(dtype)
        x_TI[-1, 0] = float("nan") if num_rows > 1 else 0.0
        together = linear.silu_gated(x_TI)
        torch.testing.assert_close(together, gated(linear(x_TI), "silu"), rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(together[:1], linear.silu_gated(x_TI[:1]))
