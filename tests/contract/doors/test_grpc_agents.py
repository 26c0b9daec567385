"""Tools, shapes, thoughts and vectors through the gRPC door, with the SDK, over engines whose answers the test knows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from antiphon.client import AsyncClient, FinishReason, Message, Tool
from antiphon.core.errors import InvalidInput

_spec = importlib.util.spec_from_file_location("doors_agents", Path(__file__).with_name("test_agents.py"))
assert _spec is not None
assert _spec.loader is not None
agents = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = agents
_spec.loader.exec_module(agents)

WEATHER = Tool(
    name="weather",
    description="How it is outside",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
QUESTION = [Message(role="user", content="what is it?")]


async def test_calls_and_thoughts_come_apart_streamed_and_whole_and_go_back(tmp_path: Path) -> None:
    answer = f"{agents.THOUGHT}</think>\n\nI look.\n{agents.CALL}"
    async with agents.answering(tmp_path, answer) as (world, _), AsyncClient(world.grpc_address) as client:
        whole = await client.generate("tiny", messages=QUESTION, tools=[WEATHER])
        assert whole.text == "I look."
        assert whole.choices[0].thought == agents.THOUGHT
        (call,) = whole.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Où?"})
        assert whole.usage is not None
        assert 0 < whole.usage.num_thought_tokens < whole.usage.num_completion_tokens
        assert "How it is outside" in agents.prompt_of(world)

        async with client.stream("tiny", messages=QUESTION, tools=[WEATHER]) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.thought for chunk in chunks) == agents.THOUGHT
        assert "".join(chunk.text for chunk in chunks) == "I look."
        assert "".join(piece.arguments for chunk in chunks for piece in chunk.calls) == call.arguments

        history = [
            *QUESTION,
            Message(role="assistant", content="", tool_calls=(call,), reasoning=agents.THOUGHT),
            Message(role="tool", content="21 degrees", tool_call_id=call.id),
        ]
        await client.generate("tiny", messages=history, tools=[WEATHER], tool_choice="none", thinking=False)
        prompt = agents.prompt_of(world)
        assert prompt.index("<tool_call>weather") < prompt.index("21 degrees")
        assert prompt.endswith("<think>\n\n</think>\n\n")


async def test_a_call_that_is_cut_off_claims_nothing(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, f"</think>{agents.CALL}") as (world, _), AsyncClient(world.grpc_address) as client:
        num_tokens = len(world.tokenizer.encode(f"</think>{agents.CALL[:-20]}").ids)
        answer = await client.generate("tiny", messages=QUESTION, tools=[WEATHER], max_tokens=num_tokens)
        assert answer.choices[0].finish_reason is FinishReason.LENGTH
        assert answer.tool_calls == ()


async def test_what_is_asked_of_an_answer_reaches_its_engine(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, "</think>x") as (world, _), AsyncClient(world.grpc_address) as client:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        asked: list[dict[str, Any]] = [
            {"json_schema": schema},
            {"json_object": True},
            {"regex": "[ab]+"},
            {"choices": ["yes", "no"]},
            {"grammar": 'start: "a"'},
            {"tools": [WEATHER], "tool_choice": "required"},
            {"tools": [WEATHER], "tool_choice": "weather"},
        ]
        for options in asked:
            await client.generate("tiny", messages=QUESTION, **options)
            rules = world.engine.requests[-1].sampling.rules
            assert rules is not None, options
            assert rules.grammar, options
        assert ")*" not in rules.grammar  # a function that is named is called once
        await client.generate("tiny", messages=QUESTION, tools=[WEATHER], tool_choice="required")
        assert ")*" in world.engine.requests[-1].sampling.rules.grammar
        await client.generate("tiny", messages=QUESTION, thinking_budget=7)
        rules = world.engine.requests[-1].sampling.rules
        assert rules is not None
        assert rules.thinking is not None
        assert rules.thinking.budget_tokens == 7
        num_requests = len(world.engine.requests)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"tools": [Tool(name="a b")]}, "tools[0].function.name"),
            ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tools": [WEATHER], "tool_choice": "other"}, "tool_name"),
            ({"regex": "("}, "shape.regex"),
            ({"choices": []}, "shape.choice"),
            ({"reasoning_effort": "enormous"}, "reasoning.effort"),
            ({"regex": "a", "choices": ["b"]}, "choices"),
        ]
        for options, field in wrong:
            with pytest.raises(InvalidInput) as refused:
                await client.generate("tiny", messages=QUESTION, **options)
            assert refused.value.field == field, options
        with pytest.raises(InvalidInput, match="for chats"):
            await client.generate("tiny", prompt="x", tools=[WEATHER])
        assert len(world.engine.requests) == num_requests


@pytest.mark.parametrize("is_ranker", [False, True])
async def test_vectors_come_through_the_sdk(tmp_path: Path, is_ranker: bool) -> None:
    (tmp_path / "checkpoint").mkdir()
    name = "Qwen3ForSequenceClassification" if is_ranker else "Qwen3Model"
    config = {"architectures": [name], "hidden_size": 4, "num_labels": 1}
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config))
    async with agents.fake.world(tmp_path) as world, AsyncClient(world.grpc_address) as client:
        assert [model.task for model in await client.list_models()] == ["rerank" if is_ranker else "embed"]
        scores = await client.score("tiny", "who listens?", ["the first choir", "a"])
        assert scores.values[0] > scores.values[1] or not is_ranker
        if is_ranker:
            with pytest.raises(InvalidInput, match="ranks"):
                await client.embed("tiny", texts=["x"])
            return
        ids = world.tokenizer.encode("The choir").ids
        for options in ({"texts": ["The choir"]}, {"token_ids": [ids]}):
            found = await client.embed("tiny", **options)
            assert found.vectors == ((3.0, 4.0, float(len(ids)), float(ids[0])),)
            assert found.num_prompt_tokens == len(ids)
        for options, field in (({"texts": ["x"], "dimensions": 2}, "dimensions"), ({"texts": [""]}, "texts"), ({}, "texts")):
            with pytest.raises(InvalidInput) as refused:
                await client.embed("tiny", **options)
            assert refused.value.field == field
        with pytest.raises(InvalidInput, match="does not generate"):
            await client.generate("tiny", prompt="x")
