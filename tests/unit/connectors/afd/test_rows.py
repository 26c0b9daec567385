"""Rows in messages: what goes in comes out, and int8 loses no more than its step."""

from __future__ import annotations

import pytest
import torch

from antiphon.connectors.afd.rows import RowFormat, SlotViews


def through(
    row_format: RowFormat, rows_TD: torch.Tensor, rows_R: torch.Tensor | None, num_ids: int, dtype: torch.dtype
) -> torch.Tensor:
    num_rows = rows_TD.shape[0] if rows_R is None else rows_R.shape[0]
    data = torch.zeros(row_format.num_bytes(num_rows, num_ids) + 40, dtype=torch.uint8)
    views = row_format.views(data, num_rows, num_ids)
    if num_ids:
        assert views.ids_RK is not None
        assert views.weights_RK is not None
        views.ids_RK.fill_(-1)
        views.weights_RK.fill_(0.5)
    row_format.write(views, row_format.encode(rows_TD), rows_R)
    assert not data[row_format.num_bytes(num_rows, num_ids) :].any(), "nothing is written past the payload"
    again = row_format.views(data[: row_format.num_bytes(num_rows, num_ids)], num_rows, num_ids)
    if num_ids:
        assert again.ids_RK is not None
        assert (again.ids_RK == -1).all()
    return row_format.read(again, dtype)


@pytest.mark.parametrize("num_ids", [0, 3])
@pytest.mark.parametrize("picked", [None, torch.tensor([4, 0, 2])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_rows_arrive_bit_for_bit(dtype: torch.dtype, picked: torch.Tensor | None, num_ids: int) -> None:
    rows_TD = torch.randn(5, 12).to(dtype)
    got = through(RowFormat(dtype, 12), rows_TD, picked, num_ids, dtype)
    assert torch.equal(got, rows_TD if picked is None else rows_TD[picked])


@pytest.mark.parametrize("num_ids", [0, 2])
@pytest.mark.parametrize("picked", [None, torch.tensor([3, 1])])
def test_int8_rows_arrive_within_half_a_step_of_their_own_scale(picked: torch.Tensor | None, num_ids: int) -> None:
    rows_TD = torch.randn(4, 64) * torch.tensor([1e-3, 1.0, 50.0, 1e4])[:, None]
    got = through(RowFormat(torch.int8, 64), rows_TD, picked, num_ids, torch.float32)
    sent = rows_TD if picked is None else rows_TD[picked]
    step_R = sent.abs().amax(dim=1, keepdim=True) / 127
    assert ((got - sent).abs() <= 0.5001 * step_R).all()


def test_int8_rows_of_bf16_come_back_in_bf16() -> None:
    rows_TD = torch.randn(3, 32, dtype=torch.bfloat16)
    got = through(RowFormat(torch.int8, 32), rows_TD, None, 0, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    assert torch.allclose(got.float(), rows_TD.float(), atol=0.05)


def test_a_row_of_zeros_stays_one() -> None:
    assert not through(RowFormat(torch.int8, 8), torch.zeros(2, 8), None, 0, torch.float32).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_does_not_make_numbers_of_what_is_none(bad: float) -> None:
    rows_TD = torch.ones(3, 8)
    rows_TD[1, 5] = bad
    got = through(RowFormat(torch.int8, 8), rows_TD, None, 0, torch.float32)
    assert not torch.isfinite(got[1]).all()
    assert torch.equal(got[[0, 2]], rows_TD[[0, 2]])


def test_views_of_a_slot_are_made_once_for_a_steady_load() -> None:
    views = SlotViews(RowFormat(torch.float32, 4))
    data, other = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    first = views.of(0, data, 2)
    assert views.of(0, data, 2) is first
    assert views.of(0, data, 3) is not first
    assert views.of(0, other, 3).data is other
