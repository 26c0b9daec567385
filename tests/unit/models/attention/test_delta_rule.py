"""The gated delta rule: chunks against one token after another, and that against the formula in plain numbers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from antiphon.models.attention.delta_rule import DeltaInputs, causal_conv, delta_chunks, delta_step

NUM_HEADS, KEY, VALUE = 3, 8, 5


def inputs(num_rows: int, decays: int, seed: int = 1) -> DeltaInputs:
    torch.manual_seed(seed)
    return DeltaInputs(
        q_TNK=torch.nn.functional.normalize(torch.randn(num_rows, NUM_HEADS, KEY), dim=-1),
        k_TNK=torch.nn.functional.normalize(torch.randn(num_rows, NUM_HEADS, KEY), dim=-1),
        v_TNV=torch.randn(num_rows, NUM_HEADS, VALUE),
        g_TNg=-torch.rand(num_rows, NUM_HEADS, decays) * 4.0,
        beta_TN=torch.rand(num_rows, NUM_HEADS),
    )


def one_by_one(x: DeltaInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outs = []
    for row in range(x.q_TNK.shape[0]):
        out, states = delta_step(x.rows(row, row + 1), state[None])
        outs.append(out)
        state = states[0]
    return torch.cat(outs), state


@pytest.mark.parametrize("decays", [1, KEY])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 64, 150])
def test_chunks_equal_one_token_after_another(num_rows: int, decays: int) -> None:
    x, state = inputs(num_rows, decays), torch.randn(NUM_HEADS, KEY, VALUE)
    expected, expected_state = one_by_one(x, state)
    out, after = delta_chunks(x, state)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(after, expected_state, atol=2e-6, rtol=1e-5)


def test_a_state_carried_from_chunk_to_chunk_is_the_whole_sequence_s() -> None:
    x, state = inputs(100, 1), torch.zeros(NUM_HEADS, KEY, VALUE)
    whole, end = delta_chunks(x, state)
    parts = []
    for start, stop in ((0, 37), (37, 38), (38, 100)):
        out, state = delta_chunks(x.rows(start, stop), state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(state, end, atol=2e-6, rtol=1e-5)


def test_a_step_is_what_the_paper_writes() -> None:
    """S <- a S (I - beta k k^T) + beta v k^T, out = S q (arXiv 2412.06464, eq. 10), in plain numbers, S being [V, K] there."""
    x = inputs(1, 1)
    chance = random.Random(2)
    before = [[[chance.gauss(0, 1) for _ in range(VALUE)] for _ in range(KEY)] for _ in range(NUM_HEADS)]
    out, after = delta_step(x, torch.tensor([before]))
    for n in range(NUM_HEADS):
        a, beta = math.exp(float(x.g_TNg[0, n, 0])), float(x.beta_TN[0, n])
        k, v, q = (each[0, n].tolist() for each in (x.k_TNK, x.v_TNV, x.q_TNK))
        for j in range(VALUE):
            along = sum(before[n][i][j] * k[i] for i in range(KEY))
            column = [a * (before[n][i][j] - beta * along * k[i]) + beta * v[j] * k[i] for i in range(KEY)]
            assert after[0, n, :, j].tolist() == pytest.approx(column, abs=1e-5)
            assert float(out[0, n, j]) == pytest.approx(sum(c * q[i] for i, c in enumerate(column)), abs=1e-5)


def test_strong_decays_overflow_nothing() -> None:
    x = inputs(64, 1)
    strong = DeltaInputs(q_TNK=x.q_TNK, k_TNK=x.k_TNK, v_TNV=x.v_TNV, g_TNg=x.g_TNg * 100.0, beta_TN=x.beta_TN)
    out, after = delta_chunks(strong, torch.randn(NUM_HEADS, KEY, VALUE))
    assert torch.isfinite(out).all()
    assert torch.isfinite(after).all()


def test_a_convolution_sees_its_taps_and_nothing_ahead() -> None:
    weight_WC, window_TC = torch.tensor([[2.0], [3.0], [5.0]]), torch.tensor([[1.0], [0.0], [10.0], [100.0]])
    assert causal_conv(window_TC, weight_WC).tolist() == [[2.0 + 50.0], [30.0 + 500.0]]
