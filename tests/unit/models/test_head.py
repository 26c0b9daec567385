"""A head computed a slice of the vocabulary at a time says what it says whole, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from antiphon.models import head as head_module
from antiphon.models.head import LMHead
from antiphon.models.layers.functional import RMSNorm
from antiphon.models.layers.linear import Linear

D, V = 64, 333


def head_of(dtype: torch.dtype, *, bias: bool = False, softcap: float | None = None) -> LMHead:
    chance = torch.Generator().manual_seed(4)
    weight = torch.randn(V, D, generator=chance).to(dtype)
    weight[200] = weight[7]  # two tokens that are always equally likely
    norm = RMSNorm(torch.ones(D, dtype=dtype), 1e-6)
    return LMHead(norm, Linear(weight, torch.randn(V, generator=chance).to(dtype) if bias else None), softcap)


def rows(dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(5)).to(dtype)


def in_slices(head: LMHead, x_RD: torch.Tensor, *, best_only: bool) -> Any:
    run = head.begin(x_RD, best_only=best_only)
    count = 1
    while not run.go_on():
        count += 1
        assert run.result is None
    return run.result, count


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_SLICE", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_slices_are_the_whole(dtype: torch.dtype, bias: bool, softcap: float | None, count: int) -> None:
    head, x_RD = head_of(dtype, bias=bias, softcap=softcap), rows(dtype, count)
    whole, (result, num_slices) = head.logits(x_RD), in_slices(head, x_RD, best_only=False)
    assert num_slices in (1, 6), "one where the weight is packed so that it can't be cut"
    assert result.best is None
    assert torch.equal(result.logits_RV, whole)
    ids_R, values_R = head.greedy(x_RD)
    (best_R, best_values_R) = in_slices(head, x_RD, best_only=True)[0].best
    assert torch.equal(best_R, ids_R)
    assert torch.equal(best_values_R, values_R)
    assert torch.equal(best_R, whole.argmax(dim=-1))


def test_the_first_of_equals_is_the_likeliest_though_they_lie_in_two_slices() -> None:
    head = head_of(torch.float32)
    x_RD = torch.randn(V, D, generator=torch.Generator().manual_seed(4))[7:8]  # the direction that both want
    (best_R, _) = in_slices(head, x_RD, best_only=True)[0].best
    assert best_R.tolist() == [7]


def test_a_row_that_is_no_number_is_told_and_leaves_the_others_alone() -> None:
    head, x_RD = head_of(torch.float32), rows(torch.float32, 3)
    expected = head.greedy(x_RD)[0].tolist()
    x_RD[1, 5] = float("nan")
    ids_R, values_R = in_slices(head, x_RD, best_only=True)[0].best
    assert torch.isnan(values_R).tolist() == [False, True, False]
    assert [ids_R[0].item(), ids_R[2].item()] == [expected[0], expected[2]]
