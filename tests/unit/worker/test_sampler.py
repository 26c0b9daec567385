"""Sampling against transformers' own logits processors, and the promise that a draw depends on seed and position alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from antiphon.core.request import SamplingParams
from antiphon.models.native.library import available
from antiphon.worker import sampler
from antiphon.worker.sampler import SamplingState, keep_allowed, logprobs_of, sample, uniform

VOCAB = 300


def state(prompt: list[int] | None = None, output: list[int] | None = None, **params: object) -> SamplingState:
    options = {"max_tokens": 10, **params}
    return SamplingState(SamplingParams(**options), frozenset({2}), prompt or [], output or [], VOCAB)  # type: ignore[arg-type]


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 17},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.6, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 0.2},
    ],
)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, float]) -> None:
    scores = logits(3)
    expected = TemperatureLogitsWarper(params["temperature"])(None, scores.clone())
    if "top_k" in params:
        expected = TopKLogitsWarper(int(params["top_k"]))(None, expected)
    if "top_p" in params:
        expected = TopPLogitsWarper(params["top_p"])(None, expected)
    if "min_p" in params:
        expected = MinPLogitsWarper(params["min_p"])(None, expected)
    probabilities = torch.softmax(expected, -1)[0]
    num_draws = 4000
    drawn = Counter(sample(scores, [state(seed=seed, **params)], [0])[0] for seed in range(num_draws))
    assert all(probabilities[token] > 0 for token in drawn)
    distance = 0.5 * sum(abs(drawn[t] / num_draws - float(probabilities[t])) for t in range(VOCAB))
    support = int((probabilities > 0).sum())
    assert distance < 1.5 * (support / num_draws) ** 0.5


def test_repetition_penalty_is_that_of_transformers() -> None:
    scores = logits(1)
    prompt, output = [5, 6, 7], [100, 101]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + output]), scores.clone())[0]
    got = state(prompt, output, temperature=0.0, repetition_penalty=1.4).adjust(scores[0], 2)
    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_penalties_count_output_only() -> None:
    scores = torch.zeros(1, VOCAB)
    got = state([5], [9, 9, 9, 4], presence_penalty=0.5, frequency_penalty=0.25).adjust(scores[0], 4)
    assert float(got[5]) == 0.0
    assert float(got[9]) == pytest.approx(-0.5 - 0.75)
    assert float(got[4]) == pytest.approx(-0.5 - 0.25)


def test_greedy_takes_the_most_probable_and_bias_moves_it() -> None:
    scores = logits(4)
    best = int(scores.argmax())
    assert sample(scores, [state(temperature=0.0)], [0]) == [best]
    assert sample(scores, [state(temperature=0.0, logit_bias={7: 1000.0})], [0]) == [7]


def test_min_tokens_masks_the_end() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, 2] = 50.0
    assert sample(scores, [state(temperature=0.0, min_tokens=3)], [2]) != [2]
    assert sample(scores, [state(temperature=0.0, min_tokens=3)], [3]) == [2]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    scores = logits(5, rows=8)
    params = {"temperature": 1.0, "top_p": 0.9}
    alone = [sample(scores[i : i + 1], [state(seed=40 + i, **params)], [i])[0] for i in range(8)]
    together = sample(scores, [state(seed=40 + i, **params) for i in range(8)], list(range(8)))
    backwards = sample(scores.flip(0), [state(seed=47 - i, **params) for i in range(8)], list(range(7, -1, -1)))
    assert alone == together == backwards[::-1]


def test_logits_that_are_not_numbers_choose_nothing_and_spare_the_other_rows() -> None:
    scores = logits(6, rows=3)
    scores[1, 5] = float("nan")
    chosen = sample(scores, [state(temperature=0.0), state(temperature=1.0), state(temperature=0.0)], [0, 0, 0])
    assert chosen[1] is None
    assert chosen[0] == int(scores[0].argmax())
    assert chosen[2] == int(scores[2].argmax())


def test_uniform_numbers_are_uniform_and_reproducible() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0.0 <= value < 1.0 for value in values)
    counts = Counter(int(value * 20) for value in values)
    assert all(abs(count - 500) < 120 for count in counts.values())
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(2**64 - 1, p) for p in range(50)}) == 50


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    scores = logits(8)[0]
    expected = torch.log_softmax(scores.double(), -1)
    got = logprobs_of(scores, 11, 4)
    assert got.logprob == pytest.approx(float(expected[11]), abs=1e-5)
    assert got.rank == int((expected > expected[11]).sum())
    assert [token for token, _ in got.top] == expected.topk(4).indices.tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.4, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 0.9, "top_k": 200, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 1.0, "frequency_penalty": 0.5, "top_p": 0.8},
    ],
)
def test_the_kernel_draws_the_tokens_that_torch_draws(params: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    if not available():
        pytest.skip("the kernels are not built here")
    rows = torch.randn(24, 5000, generator=torch.Generator().manual_seed(9)) * 4
    if "top_p" not in params:  # which of equal tokens top_p leaves out is nobody's promise
        rows[:, 77] = rows[:, 78] = rows.max(dim=1).values
    states = [SamplingState(SamplingParams(max_tokens=9, seed=row, **params), frozenset(), [5, 6], [6], 5000) for row in range(24)]  # type: ignore[arg-type]
    by_kernel = sample(rows, states, list(range(24)))
    monkeypatch.setattr(sampler, "available", lambda: False)
    assert sample(rows, states, list(range(24))) == by_kernel


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("vocab", [1, 31, 32, 300, 5003])
def test_only_what_a_mask_allows_is_left_of_logits(vocab: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (by_kernel and available()):
        monkeypatch.setattr(sampler, "available", lambda: False)
    generator = np.random.default_rng(vocab)
    num_words = -(-vocab // 32)
    words = generator.integers(0, 2**32, num_words, dtype=np.uint32)
    words[generator.random(num_words) < 0.3], words[generator.random(num_words) < 0.3] = 0, 2**32 - 1
    rows = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    before = rows.clone()
    for row, scores in zip(rows, before, strict=True):
        kept = keep_allowed(row, words.view(np.uint8))
        expected = [float(scores[i]) if int(words[i // 32]) >> i % 32 & 1 else float("-inf") for i in range(vocab)]
        assert kept.tolist() == expected
    assert torch.equal(rows, before)


def test_mixed_rows_get_the_tokens_they_get_alone() -> None:
    rows = logits(4, rows=4)
    states = [
        state(seed=1),
        state(temperature=0.0),
        state(seed=2, presence_penalty=1.0, output=[3]),
        state(temperature=0.0, min_tokens=5),
    ]
    together = sample(rows, states, [1, 1, 1, 1])
    assert together == [sample(rows[i : i + 1], [states[i]], [1])[0] for i in range(4)]
