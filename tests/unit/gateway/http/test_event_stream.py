"""The place in a stream that an event's id names: whatever steps gave the tokens, the rest follows exactly."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence

import pytest

from antiphon.core.identity import Identity, new_key
from antiphon.core.request import FinishReason
from antiphon.gateway.generation.request import (
    ChoiceDelta,
    Completed,
    Event,
    GenerationRequest,
    Sampling,
    Started,
    TextPrompt,
    Usage,
)
from antiphon.gateway.http.event_stream import CannotResume, EventStream
from antiphon.gateway.text.events import Text, Thought

IDENTITY = Identity.parse(new_key())
TOKENS = list(range(100, 130))
USAGE = Usage(
    num_prompt_tokens=1,
    num_completion_tokens=30,
    num_cached_tokens=0,
    num_remote_tokens=0,
    num_resumptions=0,
    first_token_s=0.0,
    finished_s=0.0,
)


def request() -> GenerationRequest:
    return GenerationRequest(
        request_id="r", model="m", prompts=(TextPrompt(text="p"),), sampling=Sampling(), operation="chat", stream=True, tenant="t"
    )


async def answer(cuts: Sequence[int], tokens: Sequence[int] = TOKENS) -> AsyncGenerator[Event, None]:
    """An answer whose steps gave ``cuts`` tokens each; odd tokens are thoughts, so that a step is several events."""
    yield Started(request_id="r", model="m", seed=77, num_prompt_tokens=1, created=5, prompt_texts=("p",))
    at = 0
    for cut in cuts:
        ids = tuple(tokens[at : at + cut])
        at += cut
        parts = tuple(Thought(text=f"<{i}>") if i % 2 else Text(text=f"[{i}]") for i in ids)
        reason = FinishReason.LENGTH if at >= len(tokens) else None
        yield ChoiceDelta(index=0, text="".join(p.text for p in parts), token_ids=ids, parts=parts, finish_reason=reason)
    yield Completed(usage=USAGE)


def made(event: Event) -> list[dict[str, object] | str]:
    match event:
        case Started():
            return [{"created": event.created, "n": 1}, {"n": 2}]
        case ChoiceDelta():
            ends: list[dict[str, object] | str] = [] if event.finish_reason is None else [{"end": event.finish_reason.value}]
            return [*({"part": str(part)} for part in event.parts or ()), *ends]
        case Completed():
            return ["last", "[DONE]"]


async def framed(stream: EventStream, cuts: Sequence[int], tokens: Sequence[int] = TOKENS) -> list[bytes]:
    text = b"".join([stream.frame(event, made(event), named=False) async for event in stream.events(answer(cuts, tokens))])
    return text.split(b"\n\n")[:-1]


def id_of(event: bytes) -> str:
    return event.split(b"\n")[0].removeprefix(b"id: ").decode()


async def test_the_rest_follows_behind_any_event_however_the_tokens_came() -> None:
    drawn = random.Random(4)
    for _ in range(20):
        cuts: list[int] = []
        while sum(cuts) < len(TOKENS):
            cuts.append(min(drawn.randint(1, 6), len(TOKENS) - sum(cuts)))
        whole = await framed(EventStream(request(), None, identity=IDENTITY), cuts)
        for position, event in enumerate(whole):
            stream = EventStream(request(), id_of(event), identity=IDENTITY)
            assert stream.generation.sampling.seed == 77
            assert stream.generation.token_by_token
            rest = await framed(stream, [1] * len(TOKENS))
            # Behind that place the second answer is cut by its own steps: the same parts, one by one.
            datas = [each.split(b"\ndata: ")[1] for each in whole[position + 1 :]]
            assert [each.split(b"\ndata: ")[1] for each in rest] == datas
            assert [int(id_of(each).partition(".")[0]) for each in rest] == list(range(position + 2, len(whole) + 1))


async def test_a_resumed_stream_can_be_resumed() -> None:
    whole = await framed(EventStream(request(), None, identity=IDENTITY), [3] * 10)
    for second in range(8):
        rest = await framed(EventStream(request(), id_of(whole[7]), identity=IDENTITY), [1] * 30)
        last = await framed(EventStream(request(), id_of(rest[second]), identity=IDENTITY), [1] * 30)
        assert last == rest[second + 1 :]


async def test_an_answer_that_comes_out_otherwise_is_not_gone_on_with() -> None:
    whole = await framed(EventStream(request(), None, identity=IDENTITY), [2] * 15)
    other = [*TOKENS[:4], 999, *TOKENS[5:]]
    for position in range(13, len(whole)):
        stream = EventStream(request(), id_of(whole[position]), identity=IDENTITY)
        with pytest.raises(CannotResume):
            await framed(stream, [1] * 30, other)
        with pytest.raises(CannotResume):
            await framed(EventStream(request(), id_of(whole[position]), identity=IDENTITY), [1] * 5, TOKENS[:5])


async def test_ids_of_the_key_before_hold_while_keys_are_changed() -> None:
    text = new_key()
    whole = await framed(EventStream(request(), None, identity=Identity.parse(text)), [3] * 10)
    both = Identity.parse(f"{new_key()}\n{text}")
    assert len(await framed(EventStream(request(), id_of(whole[9]), identity=both), [1] * 30)) == len(whole) - 10
