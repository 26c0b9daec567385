"""The draw that can be recorded gives the tokens of the sampler's own, for every setting and beside any other row."""

from __future__ import annotations

import pytest
import torch

from antiphon.core.request import SamplingParams
from antiphon.models.native.library import available
from antiphon.worker.cards.drawing import draw
from antiphon.worker.sampler import SamplingState, _draw, sample

SETTINGS = [
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.5, "top_k": 10},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.05},
    {"temperature": 0.0},
    {"temperature": 2.0, "top_k": 5000},
]


@pytest.mark.parametrize("vocabulary", [97, 1500])
@pytest.mark.parametrize("ties", [False, True])
def test_drawn_tokens_are_the_samplers(vocabulary: int, ties: bool) -> None:
    torch.manual_seed(vocabulary)
    for trial in range(8):
        logits_RV = 3 * torch.randn(len(SETTINGS), vocabulary)
        if ties:
            logits_RV = logits_RV.round()
        params = [SamplingParams(max_tokens=99, seed=trial * 31 + i, **each) for i, each in enumerate(SETTINGS)]
        states = [SamplingState(each, frozenset(), (), (), vocabulary) for each in params]
        draws = [state.draw_at(trial) for state in states]
        settings_SR = torch.tensor(draws, dtype=torch.float64).T.contiguous()
        best_R = logits_RV.argmax(dim=-1)
        drawn = draw(logits_RV, best_R, settings_SR, cuts=True).tolist()
        reference = [int(best_R[i]) if each.greedy else _draw(logits_RV[i], each, trial) for i, each in enumerate(params)]
        assert drawn == reference
        if available() and not ties:  # the compiled sampler's own arithmetic decides ties of rounded weights
            assert drawn == sample(logits_RV, states, [trial] * len(states))
        uncut = [i for i, each in enumerate(draws) if each is not None and not each.is_cut]
        alone = draw(logits_RV[uncut], best_R[uncut], settings_SR[:, uncut], cuts=False).tolist()
        assert alone == [drawn[i] for i in uncut]


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {1: 1.0}}, {"presence_penalty": 0.1}, {"num_logprobs": 0}, {"min_tokens": 4}, {"repetition_penalty": 1.1}],
)
def test_what_needs_more_than_logits_is_not_drawn_on_a_card(params: dict[str, object]) -> None:
    state = SamplingState(SamplingParams(max_tokens=9, **params), frozenset(), (), (), 9)  # type: ignore[arg-type]
    assert state.draw_at(3) is None
