"""Calls of tools while workers are killed inside a call's argument: real processes, prefill + 2A2F."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("running_system", Path(__file__).with_name("test_running_system.py"))
assert _spec is not None
assert _spec.loader is not None
source = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(source, "System"):
    _spec.loader.exec_module(source)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    running = source.System(tmp_path_factory.mktemp("system"), source.Collector(), num_blocks=128, toolFormat="hermes")
    try:
        yield running
    finally:
        running.deployment.close()


NOTE = {
    "type": "object",
    "properties": {"text": {"type": "string", "pattern": "^[a-z]{48}$"}},
    "required": ["text"],
    "additionalProperties": False,
}
NUMBERS = range(3)


async def call(client: httpx.AsyncClient, number: int, stream: bool, inside: Callable[[], None]) -> tuple[str, str, str]:
    """A call's name, arguments and finish reason; ``inside`` is called when a part of the argument has come."""
    tool = {"type": "function", "function": {"name": "note", "strict": True, "parameters": NOTE}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"note {number}"}], "tools": [tool], "stream": stream}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200, "temperature": 1, "seed": number}
    if not stream:
        (choice,) = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()["choices"]
        (made,) = choice["message"]["tool_calls"]
        return made["function"]["name"], made["function"]["arguments"], choice["finish_reason"]
    name, arguments, reason = "", "", ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                for part in choice["delta"].get("tool_calls") or ():
                    assert part["index"] == 0
                    name += part["function"].get("name") or ""
                    arguments += part["function"].get("arguments") or ""
                reason = choice["finish_reason"] or reason
                if len(arguments) > 20:
                    inside()
    return name, arguments, reason


@pytest.fixture(scope="module")
def undisturbed(system: Any) -> list[tuple[str, str, str]]:
    async def calls() -> list[tuple[str, str, str]]:
        async with httpx.AsyncClient(base_url=system.url, timeout=90) as client:
            return [await call(client, number, stream=False, inside=lambda: None) for number in NUMBERS]

    found = asyncio.run(calls())
    assert {(name, reason) for name, _, reason in found} == {("note", "tool_calls")}
    assert all(len(json.loads(arguments)["text"]) == 48 for _, arguments, _ in found)
    return found


@pytest.mark.parametrize("victim", [("ffn", 0), ("attention", 0), ("attention", 1)])
def test_a_call_arrives_as_it_was_whoever_dies_inside_its_argument(
    system: Any, undisturbed: list[tuple[str, str, str]], victim: tuple[str, int]
) -> None:
    asked = [(number, stream) for number in NUMBERS for stream in (True, True, False, False)]

    async def calls() -> list[tuple[str, str, str]]:
        begun: set[int] = set()
        some_begun = asyncio.Event()

        def inside(index: int) -> None:
            begun.add(index)
            if len(begun) == 2:
                some_begun.set()

        async with httpx.AsyncClient(base_url=system.url, timeout=90) as client:
            tasks = [
                asyncio.create_task(call(client, number, stream, functools.partial(inside, index)))
                for index, (number, stream) in enumerate(asked)
            ]
            async with asyncio.timeout(60):
                await some_begun.wait()
            assert not all(task.done() for task in tasks)
            os.kill(system.pid_of(*victim), signal.SIGKILL)
            return await asyncio.gather(*tasks)

    def whole() -> None:
        assert sum(bool(worker.get("ready")) for worker in system.workers()) == 5

    assert asyncio.run(calls()) == [undisturbed[number] for number, _ in asked]
    source.eventually(whole, 60.0)
