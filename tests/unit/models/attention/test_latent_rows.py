"""Products of latent attention's decodes: a row's bits in bf16 do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.attention.latent import _by_head
from antiphon.models.native.library import tiles_available


@pytest.mark.skipif(not tiles_available(), reason="this processor has no matrix units, or they are turned off")
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(4, 16, 32), (4, 32, 12), (3, 24, 40), (20, 192, 512), (32, 512, 128)])
def test_a_rows_bits_are_those_it_has_alone(heads: int, inputs: int, outputs: int) -> None:
    made = torch.Generator().manual_seed(heads)
    weight = torch.randn(heads, inputs, outputs, generator=made).to(torch.bfloat16)
    x = torch.randn(70, heads, inputs + 8, generator=made).to(torch.bfloat16)[..., :inputs]  # as a part of q lies
    alone = torch.cat([_by_head(x[i : i + 1], weight) for i in range(len(x))])
    exact = torch.einsum("bni,nio->bno", x.double(), weight.double())
    assert torch.allclose(alone.double(), exact, rtol=2**-7, atol=2**-6 * float(exact.abs().mean()))
    for first, last in ((0, 2), (3, 8), (1, 16), (5, 22), (7, 36), (2, 39), (0, 64), (0, 70)):
        assert torch.equal(_by_head(x[first:last], weight), alone[first:last])
