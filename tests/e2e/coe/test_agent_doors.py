"""Responses and Messages of a composition: the chosen expert answers in the door's own events, and counts its own tokens."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import openai

_spec = importlib.util.spec_from_file_location("coe_doors", Path(__file__).with_name("test_doors.py"))
assert _spec is not None
assert _spec.loader is not None
doors = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = doors
_spec.loader.exec_module(doors)
_agents = importlib.util.spec_from_file_location("doors_other", Path(__file__).parents[2] / "contract/doors/test_other_doors.py")
assert _agents is not None
assert _agents.loader is not None
other = importlib.util.module_from_spec(_agents)
sys.modules[_agents.name] = other
_agents.loader.exec_module(other)

artifact = doors.artifact
SUMS = doors.SUMS["messages"][0]["content"]


class _Served:
    """Stands where the gateway's own app stands: passes to a real gateway under the name of the model that it serves."""

    def __init__(self, url: str) -> None:
        self.asked: list[tuple[str, str]] = []
        self.app = self._pass
        self._url = url

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append((scope["path"], body["model"]))
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", self._url + scope["path"], json={**body, "model": "tiny"}) as answer,
        ):
            kind = answer.headers["content-type"].encode()
            await send({"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", kind)]})
            async for chunk in answer.aiter_bytes():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_responses_and_messages_reach_the_chosen_expert_with_the_same_events(artifact: Any, tmp_path: Path) -> None:
    tool: Any = {"name": "weather", "input_schema": other.agents.WEATHER["function"]["parameters"]}
    async with other.agents.answering(tmp_path, other.ANSWER) as (world, direct):
        served = _Served(world.url)
        async with doors.door(artifact, served, call_tools=True) as (client, _):
            asked: Any = {"input": SUMS, "instructions": "Be brief.", "tools": [other.FLAT_TOOL]}
            through = openai.AsyncOpenAI(base_url="http://door/v1", api_key="none", http_client=client, max_retries=0)
            whole = await through.responses.with_raw_response.create(model="coe/team", **asked)
            assert whole.headers["x-antiphon-expert"] == "model-1"  # by what the input says
            assert [item.type for item in whole.parse().output] == ["reasoning", "message", "function_call"]
            assert served.asked == [("/v1/responses", "served-1")]
            kinds = []
            for one, model in ((through, "coe/team"), (direct, "tiny")):
                async with one.responses.stream(model=model, **asked) as stream:
                    kinds.append([event.type async for event in stream])
            first, second = ([kind for kind, _ in groupby(each)] for each in kinds)  # texts may be cut otherwise
            assert first == second

            said: Any = {
                "model": "coe/team",
                "messages": [{"role": "user", "content": [{"type": "text", "text": SUMS}]}],
                "system": "Be brief.",
                "tools": [tool],
            }
            asked = {**said, "max_tokens": 500}
            message = await client.post("/v1/messages", json=asked)
            assert [block["type"] for block in message.json()["content"]] == ["thinking", "text", "tool_use"]
            assert message.headers["x-antiphon-expert"] == "model-1"
            assert served.asked[-1] == ("/v1/messages", "served-1")
            names = []
            async with httpx.AsyncClient(base_url=world.url) as straight:
                for http, model in ((client, "coe/team"), (straight, "tiny")):
                    text = (await http.post("/v1/messages", json={**asked, "model": model, "stream": True})).text
                    names.append([line for line, _ in groupby(line for line in text.splitlines() if line.startswith("event: "))])
            assert names[0] == names[1]
            assert names[0][-1] == "event: message_stop"
            counted = await client.post("/v1/messages/count_tokens", json=said)
            used = message.json()["usage"]
            assert counted.json()["input_tokens"] == used["input_tokens"] + used["cache_read_input_tokens"]
            assert served.asked[-1] == ("/v1/messages/count_tokens", "served-1")
            refused = await client.post("/v1/messages", json={**asked, "model": "coe/nobody"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found_error")


async def test_another_server_keeps_no_answer_for_everybody_who_asks_here(artifact: Any, tmp_path: Path) -> None:
    """It knows the composition's key alone: what one client had kept, another could go on with."""
    async with other.agents.answering(tmp_path, other.ANSWER) as (world, _):
        served = _Served(world.url)
        async with (
            doors.door(artifact, served, external=f"{world.url}/v1", external_model="tiny", call_tools=True) as (client, _),
            httpx.AsyncClient(base_url=world.url) as straight,
        ):
            asked: Any = {"model": "coe/team", "input": SUMS}
            answer = await client.post("/v1/responses", json=asked)
            assert (answer.headers["x-antiphon-expert"], answer.json()["store"]) == ("model-1", False)
            assert served.asked == []  # the other server answered
            assert (await straight.get(f"/v1/responses/{answer.json()['id']}")).status_code == 404
            for field, value in (("previous_response_id", answer.json()["id"]), ("store", True)):
                refused = await client.post("/v1/responses", json={**asked, field: value})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
