"""Stored responses outlive the gateway that answered: in a real Redis, another one and one that starts later go on with them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from antiphon.directory.memory import open_directory


def _beside(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if module.__spec__ is spec:
        spec.loader.exec_module(module)
    return module


agents = _beside("doors_agents", "doors/test_agents.py")
directories = _beside("directories", "test_directory.py")
ASKED: dict[str, Any] = {"model": "tiny", "tools": [{"type": "function", **agents.WEATHER["function"]}]}
ANSWER = f"{agents.THOUGHT}</think>\n\nI look.\n{agents.CALL}"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Any]:
    server = directories.RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


async def test_a_response_is_gone_on_with_at_another_gateway_and_after_a_restart(tmp_path: Path, redis: Any) -> None:
    one, other = open_directory(redis.url), open_directory(redis.url)
    try:
        async with (
            agents.answering(tmp_path / "a", ANSWER, directory=one) as (_, client),
            agents.answering(tmp_path / "b", "</think>So.", directory=other, workers=()) as (_, beside),
        ):
            first = await client.responses.create(**ASKED, input="what is it?", instructions="Be brief.")
            call: Any = first.output[-1]
            result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
            assert (await beside.responses.retrieve(first.id)).output == first.output
            second = await beside.responses.create(**ASKED, input=result, previous_response_id=first.id)
            gone = await client.responses.create(**ASKED, input="forget me")
            await beside.responses.delete(gone.id)
        # Both gateways and the worker have ended.
        async with agents.answering(tmp_path / "c", "</think>Then so.", directory=one) as (world, client):
            assert (await client.responses.retrieve(second.id)).previous_response_id == first.id
            items = (await client.responses.input_items.list(second.id)).data
            assert [item.type for item in items] == ["function_call_output"]
            async with client.responses.stream(**ASKED, input="and now?", previous_response_id=second.id) as stream:
                async for _ in stream:
                    pass
                third = await stream.get_final_response()
            assert third.output_text == "Then so."
            prompt = agents.prompt_of(world)
            said = ("what is it?", "I look.", "<tool_call>weather", "21 degrees", "and now?")
            places = [prompt.index(text, prompt.index("</tools>")) for text in said]
            assert places == sorted(places)
            assert "Be brief." not in prompt  # instructions are of one response
            for lost in (gone.id, "resp_nobody"):
                with pytest.raises(openai.NotFoundError):
                    await client.responses.retrieve(lost)
                with pytest.raises(openai.BadRequestError):
                    await client.responses.create(**ASKED, input="x", previous_response_id=lost)
    finally:
        await one.close()
        await other.close()
