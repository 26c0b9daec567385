"""The plan of a step is checked by walking through it as the hardware would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.worker.ubatches.plan import Half, Segment, plan_ops, split_segments


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("num_ubatches", [1, 2, 3, 4])
def test_every_half_runs_once_in_an_order_that_data_allows(num_layers: int, num_ubatches: int) -> None:
    attended: set[tuple[int, int]] = set()
    combined: set[tuple[int, int]] = set()
    away: set[int] = set()
    for op in plan_ops(num_layers, num_ubatches):
        key = (op.layer, op.ubatch)
        if op.half is Half.ATTEND:
            assert op.layer == 0 or (op.layer - 1, op.ubatch) in combined
            assert op.ubatch == 0 or (op.layer, op.ubatch - 1) in attended, "K and V of earlier rows must be there"
            assert op.ubatch not in away
            attended.add(key)
            away.add(op.ubatch)
        else:
            assert key in attended
            combined.add(key)
            away.remove(op.ubatch)
    everything = {(layer, ubatch) for layer in range(num_layers) for ubatch in range(num_ubatches)}
    assert attended == combined == everything


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 10))
def test_splitting_keeps_every_row_in_order_and_balances(sizes: list[int], num_ubatches: int, min_rows: int) -> None:
    segments = [Segment(request=i, first_token=100 * i, num_tokens=n) for i, n in enumerate(sizes)]
    runs = split_segments(segments, num_ubatches, min_rows)
    rows = [(s.request, s.first_token + t) for run in runs for s in run for t in range(s.num_tokens)]
    assert rows == [(i, 100 * i + t) for i, n in enumerate(sizes) for t in range(n)]
    counts = [sum(s.num_tokens for s in run) for run in runs]
    assert max(counts) - min(counts) <= 1
    assert len(runs) <= num_ubatches
    assert len(runs) == 1 or min(counts) >= min_rows
