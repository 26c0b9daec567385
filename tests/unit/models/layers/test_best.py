"""The most likely token without logits: the lowest of the largest, whatever the width, and told where it is no number."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.layers.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (32, 32), (500, 64), (6144, 576), (33, 1100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_best_is_the_lowest_of_the_largest(dtype: torch.dtype, outputs: int, inputs: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight_OI, bias_O = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype) if with_bias else None
    if outputs > 40:  # equal outputs: the first is meant
        for twin in (outputs // 2, outputs - 1):
            weight_OI[twin] = weight_OI[3]
            if bias_O is not None:
                bias_O[twin] = bias_O[3]
    linear = Linear(weight_OI, bias_O)
    for num_rows in (1, 9, 64, 130):
        x_TI = torch.randn(num_rows, inputs).to(dtype)
        if num_rows > 8:
            x_TI[1] = weight_OI[3] * 3
            x_TI[5, 0], x_TI[6, 0] = float("nan"), float("inf")
        results_TO = linear.in_fp32(x_TI)
        indices_T, values_T = linear.best(x_TI)
        torch.testing.assert_close(values_T, results_TO.amax(-1), rtol=0, atol=0, equal_nan=True)
        for row in range(num_rows):
            if not torch.isnan(values_T[row]):
                assert indices_T[row] == (results_TO[row] == values_T[row]).nonzero()[0]
