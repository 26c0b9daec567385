"""The HTTP door with OpenAI's own client, over loopback sockets, against engines that really stream."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

QUESTION = [{"role": "user", "content": "what is it?"}]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path) as made:
        yield made


@pytest.fixture
async def client(world: fake.World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


async def test_a_chat_is_answered_with_text_usage_and_finish(world: fake.World, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=QUESTION, max_completion_tokens=12, seed=5)
    assert answer.choices[0].message.content == world.text_of(world.chat_tokens_of("what is it?", 12, seed=5))
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.usage is not None
    num_prompt = len(world.tokenizer.encode("<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n").ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 12)
    assert answer.usage.total_tokens == num_prompt + 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_streamed_chat_adds_up_to_the_whole_one(world: fake.World, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=40, seed=7, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == world.text_of(world.chat_tokens_of("what is it?", 40, seed=7))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_same_seed_gives_the_same_text_and_another_seed_another(client: openai.AsyncOpenAI) -> None:
    async def text(seed: int) -> str | None:
        answer = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=16, seed=seed)
        return answer.choices[0].message.content

    assert await text(1) == await text(1)
    assert await text(1) != await text(2)


async def test_choices_draw_with_seeds_of_their_own(world: fake.World, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, seed=5, n=3)
    expected = [world.text_of(world.chat_tokens_of("what is it?", 8, seed=5 + index)) for index in range(3)]
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24


async def test_streamed_choices_come_interleaved_and_whole(world: fake.World, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, seed=5, n=3, stream=True)
    texts = ["", "", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [world.text_of(world.chat_tokens_of("what is it?", 8, seed=5 + index)) for index in range(3)]


async def test_a_completion_continues_its_prompt(world: fake.World, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="The choir", max_tokens=10, seed=3)
    assert answer.choices[0].text == world.text_of(world.tokens_of("The choir", 10, seed=3))
    assert answer.object == "text_completion"


async def test_a_completion_without_max_tokens_has_sixteen(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="The choir")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_a_chat_without_max_tokens_fills_the_context(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=QUESTION)
    assert answer.usage is not None
    assert answer.usage.total_tokens == fake.MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


async def test_token_ids_are_a_prompt_too(world: fake.World, client: openai.AsyncOpenAI) -> None:
    ids = world.tokenizer.encode("The choir").ids
    by_ids = await client.completions.create(model="tiny", prompt=ids, max_tokens=6, seed=1)
    by_text = await client.completions.create(model="tiny", prompt="The choir", max_tokens=6, seed=1)
    assert by_ids.choices[0].text == by_text.choices[0].text


async def test_several_prompts_give_a_choice_each(world: fake.World, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=5, seed=9, n=2)
    expected = [
        world.text_of(world.tokens_of(prompt, 5, seed=9 + index)) for index, prompt in enumerate(["one", "one", "two", "two"])
    ]
    assert [choice.text for choice in answer.choices] == expected


async def test_echo_begins_with_the_prompt(world: fake.World, client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt="The choir", max_tokens=4, seed=1, echo=True)
    assert whole.choices[0].text == "The choir" + world.text_of(world.tokens_of("The choir", 4, seed=1))
    stream = await client.completions.create(model="tiny", prompt="The choir", max_tokens=4, seed=1, echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_a_stop_string_cuts_the_text_and_frees_the_engine(world: fake.World, client: openai.AsyncOpenAI) -> None:
    full = world.text_of(world.chat_tokens_of("what is it?", 60, seed=5))
    stop = full[20:23]
    answer = await client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=200, seed=5, stop=[stop, "never ever"]
    )
    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 60
    await fake.until(lambda: world.engine.num_live == 0)


async def test_a_streamed_stop_string_is_never_shown(world: fake.World, client: openai.AsyncOpenAI) -> None:
    full = world.text_of(world.chat_tokens_of("what is it?", 60, seed=5))
    stop = full[20:26]
    stream = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=200, seed=5, stop=stop, stream=True)
    text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
    assert text == full[: full.index(stop)]


async def test_logprobs_of_a_chat_name_tokens_bytes_and_alternatives(world: fake.World, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=30, seed=5, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 30
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in logprobs.content)
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content


async def test_streamed_logprobs_are_the_whole_ones(client: openai.AsyncOpenAI) -> None:
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 30, "seed": 5, "logprobs": True, "top_logprobs": 1}
    whole = await client.chat.completions.create(**options)
    stream = await client.chat.completions.create(**options, stream=True)
    entries = [
        entry
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert whole.choices[0].logprobs is not None
    assert entries == whole.choices[0].logprobs.content


async def test_logprobs_of_a_completion_are_four_lists(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="The choir", max_tokens=5, seed=1, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [len(part or []) for part in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)] == [5, 5, 5]
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


async def test_the_end_of_sequence_stops_and_is_not_shown(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, eos_after=6) as world,
        openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(model="tiny", messages=QUESTION, seed=5)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == world.text_of(world.chat_tokens_of("what is it?", 6, seed=5))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        longer = await client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=9, extra_body={"ignore_eos": True}
        )
        assert longer.choices[0].finish_reason == "length"


async def test_extensions_reach_the_engine(world: fake.World, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=2,
        temperature=0.5,
        top_p=0.75,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"17": 2.0},
        seed=-1,
        extra_body={
            "top_k": 40,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "min_tokens": 1,
            "stop_token_ids": [7],
            "priority": 3,
            "cache_salt": "tenant",
            "speculation": "off",
        },
    )
    request = world.engine.requests[-1]
    sampling = request.sampling
    assert not sampling.speculates
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 40, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.25, -0.5, 1.5)
    assert sampling.logit_bias == {17: 2.0}
    assert sampling.seed == 2**64 - 1
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.stop_token_ids) == (True, 1, frozenset({7}))
    assert (request.priority, request.cache_salt) == (3, "tenant")
    assert request.eos_token_ids == {world.tokenizer.token_to_id(fake.EOS)}


async def test_a_seed_is_drawn_for_those_who_give_none(world: fake.World, client: openai.AsyncOpenAI) -> None:
    for _ in range(2):
        await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    first, second = (request.sampling.seed for request in world.engine.requests)
    assert first != second
    assert all(request.sampling.speculates for request in world.engine.requests)


async def test_models_are_listed_and_found(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "antiphon"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nobody/knows")
    assert caught.value.code == "model_not_found"


async def test_text_parts_are_a_message(world: fake.World, client: openai.AsyncOpenAI) -> None:
    parts = [{"type": "text", "text": "what is"}, {"type": "text", "text": "it?"}]
    answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=4, seed=1)
    assert answer.choices[0].message.content == world.text_of(world.chat_tokens_of("what is\nit?", 4, seed=1))


async def test_harmless_fields_are_taken(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=1,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
        parallel_tool_calls=True,
    )
    assert answer.choices


async def test_an_assistants_message_can_be_sent_back(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3)
    history = [*QUESTION, first.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]
    assert (await client.chat.completions.create(model="tiny", messages=history, max_tokens=3)).choices


async def test_the_request_id_is_taken_over_and_returned(world: fake.World, client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "chatcmpl-mine-1"
    assert world.engine.requests[-1].request_id.startswith("mine-1/")


async def test_an_echo_of_nothing_more_is_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="The choir", max_tokens=0, echo=True)
    assert answer.choices[0].text == "The choir"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
