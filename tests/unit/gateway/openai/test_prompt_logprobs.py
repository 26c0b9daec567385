"""What is shown of a prompt's log-probabilities: in an echo, by themselves, or both, each as many as were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from antiphon.core.request import FinishReason
from antiphon.gateway.generation.request import ChoiceDelta, Logprob, Started, TokenProbability, Usage
from antiphon.gateway.openai.answers import Answer
from antiphon.gateway.openai.parsing import parse
from antiphon.gateway.openai.schema import CompletionBody

USAGE = Usage(
    num_prompt_tokens=2, num_completion_tokens=1, num_cached_tokens=0, num_remote_tokens=0, num_resumptions=0,
    first_token_s=0.0, finished_s=0.0,
)  # fmt: skip


def _at(token_id: int, num_top: int) -> Logprob:
    top = tuple(TokenProbability(token_id=i, text=f"t{i}", raw=b"t%d" % i, logprob=-float(i)) for i in range(num_top))
    chosen = TokenProbability(token_id=token_id, text=f"t{token_id}", raw=b"t%d" % token_id, logprob=-float(token_id))
    return Logprob(chosen=chosen, rank=token_id, top=top)


@pytest.mark.parametrize(
    ("asked", "num_asked", "in_echo", "by_itself"),
    [
        ({"echo": True, "prompt_logprobs": 2}, 2, None, 3),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, 3, 2, 4),
        ({"echo": True, "logprobs": 3, "prompt_logprobs": 0}, 3, 4, 1),
        ({"logprobs": 3, "prompt_logprobs": 1}, 1, 0, 2),
        ({"echo": True, "logprobs": 2}, 2, 3, None),
    ],
)
def test_each_way_shows_as_many_as_it_was_asked_for(
    asked: dict[str, Any], num_asked: int, in_echo: int | None, by_itself: int | None
) -> None:
    body = parse(CompletionBody, {"model": "m", "prompt": "t9t9", "max_tokens": 1, **asked})
    sampling = body.request(request_id="r", deadline_s=None, traceparent=None).sampling
    assert sampling.num_prompt_logprobs == num_asked
    answer = Answer(chat=False, echo=bool(body.echo), num_logprobs=sampling.num_logprobs, num_prompt_logprobs=body.prompt_logprobs)
    answer.start(Started(request_id="r", model="m", seed=1, num_prompt_tokens=2, created=0, prompt_texts=("t9t9",)))
    answer.add(ChoiceDelta(index=0, prompt_logprobs=(_at(9, num_asked), _at(9, num_asked)), finish_reason=FinishReason.LENGTH))
    choice = answer.body(USAGE)["choices"][0]
    if in_echo is None:
        assert choice["logprobs"] is None
    else:
        assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [in_echo] * 2 * bool(in_echo)
    if by_itself is None:
        assert "prompt_logprobs" not in choice
    else:
        assert [len(place) for place in choice["prompt_logprobs"]] == [by_itself] * 2
