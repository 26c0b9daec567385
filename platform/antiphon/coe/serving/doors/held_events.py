"""A gRPC answer that is held back until it is taken: its events, as a whole and for the client (request speed).

Must not know: which answers are taken, who is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from antiphon.coe.serving.combining import Answer, Asked, AskFailed
from antiphon.gateway.generation.request import ChoiceDelta, Completed, Event, GenerationRequest, Started


def held_answer(events: list[Event]) -> Answer[list[Event]]:
    """All events of one expert as an answer.

    Raises:
        AskFailed: they are no whole answer.
    """
    if not events or not isinstance(events[-1], Completed):
        raise AskFailed("broke off its answer")
    deltas = [event for event in events if isinstance(event, ChoiceDelta)]
    logprobs = [one.chosen.logprob for delta in deltas for one in delta.logprobs]
    usage = events[-1].usage
    return Answer(
        text="".join(delta.text for delta in deltas),
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_completion_tokens=usage.num_completion_tokens,
        payload=events,
    )


def given_events(events: Sequence[Event], request: GenerationRequest, asked: Sequence[Asked]) -> Iterator[Event]:
    """The events of the taken answer for the client, who gets its own request id and no probabilities unless asked for."""
    for event in events:
        match event:
            case Started():
                yield replace(event, request_id=request.request_id)
            case ChoiceDelta():
                yield event if request.sampling.num_logprobs is not None else replace(event, logprobs=())
            case Completed():
                yield _with_usage(event, asked)


def total_of(event: Completed, asked: Sequence[Asked]) -> Completed:
    """The end of an answer that was passed on as it came: with what was used by those who were asked before."""
    usage = event.usage
    return replace(
        event,
        usage=replace(
            usage,
            num_prompt_tokens=usage.num_prompt_tokens + sum(one.num_prompt_tokens for one in asked),
            num_completion_tokens=usage.num_completion_tokens + sum(one.num_completion_tokens for one in asked),
        ),
    )


def _with_usage(event: Completed, asked: Sequence[Asked]) -> Completed:
    usage = replace(
        event.usage,
        num_prompt_tokens=sum(one.num_prompt_tokens for one in asked),
        num_completion_tokens=sum(one.num_completion_tokens for one in asked),
    )
    return replace(event, usage=usage)
