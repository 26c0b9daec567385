"""Fetching what comes next changes no value and ends with the wait."""

import pytest
import torch

from antiphon.models.native.library import tiles_available
from antiphon.models.prefetch import WeightPrefetch

needs_tiles = pytest.mark.skipif(not tiles_available(), reason="the processor has no matrix units, so nothing is packed for them")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_tiles
def test_fetching_is_asked_after_at_every_piece_and_ends_when_the_wait_does():
    weight = torch.zeros(1 << 19, dtype=torch.bfloat16)
    asked = iter([False, False, True])
    WeightPrefetch([weight]).warm(0, lambda: next(asked))
    assert next(asked, None) is None


@needs_tiles
def test_a_weight_smaller_than_a_piece_is_fetched_to_its_end_and_not_beyond():
    asked = []
    WeightPrefetch([torch.zeros(40, dtype=torch.bfloat16)]).warm(0, lambda: bool(asked.append(None)))
    assert len(asked) == 1


@needs_tiles
def test_bytes_outside_a_weight_are_refused():
    with pytest.raises(RuntimeError):
        torch.ops.antiphon.warm(torch.zeros(8), 0, 33)


def test_a_layer_without_weights_to_fetch_is_passed_over():
    WeightPrefetch([None]).warm(0, lambda: pytest.fail("asked"))
