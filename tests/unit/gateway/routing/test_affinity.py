"""Remembering who served which beginning."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.core.ids import WorkerId
from antiphon.gateway.routing.affinity import BLOCK_TOKENS, MAX_BLOCKS, PrefixAffinity, prefix_keys

A, B = WorkerId("a"), WorkerId("b")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_the_match_is_the_shared_beginning_in_whole_blocks(num_shared: int, num_first: int, num_second: int) -> None:
    shared = list(range(num_shared))
    first = shared + [10_000 + i for i in range(num_first)]
    second = shared + [20_000 + i for i in range(num_second)]
    affinity = PrefixAffinity()
    affinity.record(prefix_keys(first, ""), A)
    expected = num_shared // BLOCK_TOKENS * BLOCK_TOKENS
    assert affinity.match(prefix_keys(second, "")).get(A, 0) == expected


def test_the_last_worker_counts() -> None:
    affinity = PrefixAffinity()
    keys = prefix_keys(range(100), "")
    affinity.record(keys, A)
    affinity.record(keys[:1], B)
    assert affinity.match(keys) == {B: BLOCK_TOKENS, A: 3 * BLOCK_TOKENS}


def test_tenants_and_models_are_kept_apart() -> None:
    affinity = PrefixAffinity()
    affinity.record(prefix_keys(range(100), "one"), A)
    assert affinity.match(prefix_keys(range(100), "two")) == {}


def test_the_oldest_are_forgotten() -> None:
    affinity = PrefixAffinity(max_keys=3)
    old, new = prefix_keys(range(100), ""), prefix_keys(range(100, 200), "")
    affinity.record(old, A)
    affinity.record(new, B)
    assert affinity.match(old) == {}
    assert affinity.match(new) == {B: 96}


def test_very_long_prompts_cost_no_more_keys() -> None:
    assert len(prefix_keys(range(10**6), "")) == MAX_BLOCKS
