"""A stream of server-sent events goes on after a lost connection, at any gateway, with no event lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.rpc.directory.service import DirectoryServer

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[1] / "doors" / "fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

SAID = [{"role": "user", "content": "what is it?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 24, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "The choir", "max_tokens": 24, "logprobs": 1, "echo": True},
    "/v1/responses": {"input": "what is it?", "max_output_tokens": 24},
    "/v1/messages": {"messages": SAID, "max_tokens": 24},
}
GATEWAY = """
import asyncio, sys
from pathlib import Path
from antiphon.directory.memory import open_directory
from antiphon.gateway.app import run_gateway
from antiphon.gateway.config import GatewayConfig

config = GatewayConfig(models={"tiny": Path(sys.argv[1])}, http_port=0, grpc_port=0, refresh_s=0.05)
told = lambda ports: print(ports.http_port, flush=True)
asyncio.run(run_gateway(config, open_directory(sys.argv[2]), asyncio.Event(), on_bound=told))
"""


@dataclass(frozen=True)
class Sent:
    """One event as it came over the wire."""

    id: str
    rest: str

    @classmethod
    def all_of(cls, text: str) -> list[Sent]:
        *blocks, rest = text.split("\n\n")
        assert rest == ""
        found = []
        for block in blocks:
            first, _, others = block.partition("\n")
            assert first.startswith("id: "), block
            # Which second it was when the last event was made, and what the cache gave, are the second call's own.
            others = re.sub(r'"(completed_at|\w*_?cached_tokens|cache_read_input_tokens|input_tokens)":[^,}]+', r'"\1":0', others)
            found.append(cls(first.removeprefix("id: "), others))
        return found


def text_of(events: Sequence[Sent]) -> str:
    return str(fake.said(event.rest for event in events))


def middle_of(text: str) -> Sent:
    events = Sent.all_of(text)
    return events[len(events) // 2]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path, gateway={"api_keys": frozenset({"alice", "bob"})}) as made:
        yield made


@pytest.fixture
async def http(world: fake.World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=world.url, timeout=20, headers={"authorization": "Bearer alice"}) as made:
        yield made


def asked(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "stream": True, **BODIES[path], **fields}


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_goes_on_behind_any_of_its_events(http: httpx.AsyncClient, path: str) -> None:
    whole = await http.post(path, json=asked(path))
    events = Sent.all_of(whole.text)
    numbers = [int(event.id.partition(".")[0]) for event in events]
    assert numbers == list(range(1, len(events) + 1))
    request_id = whole.headers["x-request-id"]
    last = len(events)
    for position in sorted({*range(min(4, last)), last // 2, *range(max(0, last - 6), last)}):
        headers = {"x-request-id": request_id, "last-event-id": events[position].id}
        rest = await http.post(path, json=asked(path), headers=headers)
        assert rest.status_code == 200
        assert rest.headers["content-type"].startswith("text/event-stream")
        sent = Sent.all_of(rest.text)  # cut otherwise, where the gateway was behind its engine the first time
        assert text_of([*events[: position + 1], *sent]) == text_of(events)
        assert [int(event.id.partition(".")[0]) for event in sent] == list(range(position + 2, position + 2 + len(sent)))
        assert bool(sent) == (position + 1 < len(events))
        assert not sent or fake.kind(sent[-1].rest) == fake.kind(events[-1].rest)


async def test_nobody_else_goes_on_with_a_stream(world: fake.World, http: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    whole = await http.post(path, json=asked(path))
    event = middle_of(whole.text)
    mine = {"x-request-id": whole.headers["x-request-id"], "last-event-id": event.id}
    wrong: list[dict[str, str]] = [
        {**mine, "authorization": "Bearer bob"},
        {**mine, "x-request-id": "another"},
        {"last-event-id": event.id},
        {**mine, "last-event-id": f"7{event.id[1:]}"},
        {**mine, "last-event-id": "6"},
        {**mine, "last-event-id": event.id[:-1]},
        {**mine, "last-event-id": "é" * 60},
        {**mine, "last-event-id": "9" * 5000},
    ]
    num_requests = len(world.engine.requests)
    for headers in wrong:
        answer = await http.post(path, json=asked(path), headers={k: v.encode() for k, v in headers.items()})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "last-event-id"
    assert len(world.engine.requests) == num_requests
    for fields in ({"stream": False, "stream_options": None}, {"n": 2}):
        answer = await http.post(path, json=asked(path, **fields), headers=mine)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "last-event-id"


async def test_another_answer_is_not_given_for_the_rest_of_this_one(http: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    whole = await http.post(path, json=asked(path))
    headers = {"x-request-id": whole.headers["x-request-id"], "last-event-id": middle_of(whole.text).id}
    for fields in ({"messages": [{"role": "user", "content": "and this?"}]}, {"max_tokens": 3}):
        answer = await http.post(path, json=asked(path, **fields), headers=headers)
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "cannot_resume"


@asynccontextmanager
async def gateway_process(checkpoint: Path, directory: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, str(checkpoint), directory, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_streams_of_a_gateway_that_is_gone_go_on_at_another(tmp_path: Path, fault: signal.Signals) -> None:
    async with fake.world(tmp_path, max_num_seqs=16, step_s=0.004) as world, httpx.AsyncClient(timeout=30) as http:
        directory = await DirectoryServer.start(world.directory)
        try:
            async with (
                gateway_process(world.checkpoint, directory.address) as (first, here),
                gateway_process(world.checkpoint, directory.address) as (_, there),
            ):
                world.engine.stop_after_tokens = 30  # all streams are in their midst when their gateway dies
                streams = [(path, number) for path in BODIES for number in range(2)]
                fields = {"seed": None, "max_tokens": 100, "temperature": 1.0}
                ids: dict[tuple[str, int], str] = {}
                texts = dict.fromkeys(streams, "")

                def body(path: str) -> dict[str, Any]:
                    own = {"max_output_tokens": 100, "temperature": 1.0} if path == "/v1/responses" else fields
                    return asked(path, **{k: v for k, v in own.items() if v is not None})

                async def read(key: tuple[str, int]) -> None:
                    with contextlib.suppress(httpx.HTTPError):  # which came in the midst: fewer events are asserted below
                        async with http.stream("POST", here + key[0], json=body(key[0])) as response:
                            ids[key] = response.headers["x-request-id"]
                            async for piece in response.aiter_text():
                                texts[key] += piece

                async with asyncio.TaskGroup() as group:
                    reading = [group.create_task(read(key)) for key in streams]
                    await fake.until(lambda: all(text.count("\n\n") > 4 for text in texts.values()), 60)
                    assert first.pid != os.getpid()
                    first.send_signal(fault)
                    if fault == signal.SIGSTOP:  # nothing tells its clients: their own patience ends
                        for task in reading:
                            task.cancel()
                world.engine.stop_after_tokens = None
                for key, text in texts.items():
                    seen = Sent.all_of(text[: text.rfind("\n\n") + 2])  # what came last may be half an event
                    assert 2 < len(seen) < 100
                    headers = {"x-request-id": ids[key], "last-event-id": seen[-1].id}
                    rest = Sent.all_of((await http.post(there + key[0], json=body(key[0]), headers=headers)).text)
                    whole = Sent.all_of(
                        (await http.post(there + key[0], json=body(key[0]), headers={**headers, "last-event-id": seen[0].id})).text
                    )
                    assert text_of([*seen, *rest]) == text_of([seen[0], *whole])
                    assert fake.kind(rest[-1].rest) == fake.kind(whole[-1].rest)
        finally:
            await directory.close()
