"""The closed-form attention:FFN ratio against brute force, and the barrier against sampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.planner.pipeline.barrier import expected_max, imbalance, slowest_context
from antiphon.planner.pipeline.ratio import LinearTimes, optimal_ratio, optimal_ratio_with_barrier

coefficient = st.floats(1e-7, 1e-4)


@given(st.floats(1e-9, 1e-7), st.floats(1e-6, 1e-4), coefficient, st.floats(1e-6, 1e-3), st.floats(0, 1e-3), st.floats(1, 512))
@settings(max_examples=150, deadline=None)
def test_no_ratio_beats_the_closed_form(per_token, fixed, per_row, ffn_fixed, exchange, batch):
    times = LinearTimes(
        attention_per_token_s=per_token,
        attention_fixed_s=fixed,
        ffn_per_row_s=per_row,
        ffn_fixed_s=ffn_fixed,
        exchange_s=exchange,
    )
    tokens = batch * 4000
    best = optimal_ratio(times, batch, tokens)
    rate = times.rows_per_worker_s(best, batch, tokens)
    for ratio in np.geomspace(1e-3, 1e4, 400):
        assert times.rows_per_worker_s(float(ratio), batch, tokens) <= rate * (1 + 1e-9)


def test_each_bound_of_the_published_rule_can_be_the_one_that_holds():
    """arXiv 2601.21351: r* = max{(alpha_A T + beta_A - beta_F) / (alpha_F B), (t_C - beta_F) / (alpha_F B),
    sqrt(beta_F / (alpha_F B))}.
    """
    shared = {"attention_per_token_s": 1e-8, "attention_fixed_s": 1e-5, "ffn_per_row_s": 1e-6}
    long = LinearTimes(**shared, ffn_fixed_s=1e-5, exchange_s=0.0)
    assert optimal_ratio(long, 10, 100_000) == pytest.approx((1e-8 * 1e5 + 1e-5 - 1e-5) / (1e-6 * 10))
    slow_link = LinearTimes(**shared, ffn_fixed_s=1e-5, exchange_s=5e-3)
    assert optimal_ratio(slow_link, 10, 100_000) == pytest.approx((5e-3 - 1e-5) / (1e-6 * 10))
    heavy = LinearTimes(**shared, ffn_fixed_s=1e-2, exchange_s=0.0)
    assert optimal_ratio(heavy, 10, 100_000) == pytest.approx((1e-2 / (1e-6 * 10)) ** 0.5)


def test_the_ratio_with_barrier_is_the_plain_one_when_contexts_do_not_vary():
    times = LinearTimes(attention_per_token_s=1e-8, attention_fixed_s=1e-5, ffn_per_row_s=5e-6, ffn_fixed_s=1e-5, exchange_s=0.0)
    plain = optimal_ratio(times, 20, 20 * 8000)
    assert optimal_ratio_with_barrier(times, 20, 8000, 0.0) in (int(plain), int(plain) + 1)


@pytest.mark.parametrize("count", [2, 5, 16, 100, 1000])
def test_the_expected_maximum_is_that_of_samples(count):
    samples = np.random.default_rng(1).standard_normal((4000, count)).max(axis=1)
    assert expected_max(count) == pytest.approx(samples.mean(), abs=4 * samples.std() / 4000**0.5)


def test_the_slowest_worker_is_that_of_sampled_contexts():
    rng = np.random.default_rng(2)
    contexts = rng.uniform(1000, 9000, size=(2000, 32, 64)).mean(axis=2).max(axis=1).mean()
    ours = slowest_context(mean=5000, deviation=8000 / 12**0.5, rows=64, slowest=expected_max(32))
    assert ours == pytest.approx(contexts, rel=0.005)


def test_the_hottest_card_is_that_of_drawn_experts():
    rng = np.random.default_rng(3)
    cards = rng.integers(0, 16, size=(1000, 4096))  # 4,096 draws over 16 cards
    hottest = np.array([np.bincount(row, minlength=16).max() for row in cards]).mean() / (4096 / 16)
    assert imbalance(rows=512, experts_per_row=8, num_cards=16, skew=1.0) == pytest.approx(hottest, rel=0.01)


def test_a_dense_ffn_and_a_single_card_are_balanced():
    assert imbalance(rows=10, experts_per_row=0, num_cards=8, skew=1.0) == 1.0
    assert imbalance(rows=10, experts_per_row=8, num_cards=1, skew=3.0) == 1.0
