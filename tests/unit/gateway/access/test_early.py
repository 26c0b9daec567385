"""What is refused by its headers alone: a flood's bodies are not looked at, a light tenant gets in, one in line is answered."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from antiphon.core.budget import TenantLimits
from antiphon.gateway.access.key_lines import key_line

_spec = importlib.util.spec_from_file_location(
    "doors_fake_engine", Path(__file__).parents[3] / "contract" / "doors" / "fake_engine.py"
)
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

FLOOD, CALM = "flood-key-of-random-text", "calm-key-of-random-text"
BODY = json.dumps({"model": "tiny", "prompt": "what is it?", "max_tokens": 2}).encode()
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


def head(path: str, key: str, num_bytes: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", f"content-length: {num_bytes}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


@asynccontextmanager
async def full_world(tmp_path: Path) -> AsyncIterator[fake.World]:
    """The flooding tenant holds the one place and both in the queue, to the end."""
    limits = TenantLimits(num_streams=5)
    (tmp_path / "keys").write_text(f"{key_line('flood', 'user', FLOOD)}\n{key_line('calm', 'user', CALM, limits=limits)}\n")
    options = {"api_keys_file": tmp_path / "keys"}
    async with fake.world(tmp_path, gateway=options, max_num_seqs=1, max_queued=2) as world:
        world.engine.stop_after_tokens = 0
        async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
            headers = {"authorization": f"Bearer {FLOOD}"}
            held = [asyncio.create_task(http.post(PATHS[0], content=BODY, headers=headers)) for _ in range(3)]
            await fake.until(lambda: world.engine.num_live == 3)
            try:
                yield world
            finally:
                world.engine.stop_after_tokens = None
                assert [(await each).status_code for each in held] == [200] * 3


async def test_where_all_queues_are_full_a_flood_is_refused_before_its_bodies_come(tmp_path: Path) -> None:
    async with full_world(tmp_path) as world:
        for path in PATHS:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.ports.http_port)
            async with asyncio.timeout(10):
                writer.write(head(path, FLOOD, len(BODY)))
                status, headers, body = await answer(reader)  # nothing of its body is there
                assert (status, int(headers["retry-after"]) >= 1) == (429, True)
                assert "full queues" in json.loads(body)["error"]["message"]
                # What it sends all the same is thrown away, and the connection's next request is another one.
                writer.write(b"\xff" * len(BODY) + head("/v1/models", FLOOD, 0).replace(b"POST", b"GET"))
                status, _, body = await answer(reader)
                assert (status, json.loads(body)["data"][0]["id"]) == (200, "tiny")
            writer.close()


async def test_a_flood_that_asks_before_it_sends_is_not_told_to_send(tmp_path: Path) -> None:
    async with full_world(tmp_path) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.ports.http_port)
        async with asyncio.timeout(10):
            writer.write(head(PATHS[0], FLOOD, 2**21, "expect: 100-continue"))
            assert (await answer(reader))[0] == 429
        writer.close()


async def test_a_tenant_with_less_in_the_queue_is_let_through_to_the_engine(tmp_path: Path) -> None:
    async with full_world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        refused = await http.post(PATHS[0], content=BODY, headers={"authorization": f"Bearer {CALM}"})
        assert refused.status_code == 429
        assert "the engine's queue is full" in refused.text  # this engine gives way to nobody; the gateway asked it


async def test_a_tenant_with_all_its_requests_at_once_is_refused_before_its_bodies_come(tmp_path: Path) -> None:
    limits = TenantLimits(num_streams=1)
    (tmp_path / "keys").write_text(f"{key_line('calm', 'user', CALM, limits=limits)}\n")
    async with fake.world(tmp_path, gateway={"api_keys_file": tmp_path / "keys"}, max_num_seqs=9, max_queued=9) as world:
        world.engine.stop_after_tokens = 0
        async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
            headers = {"authorization": f"Bearer {CALM}"}
            held = asyncio.create_task(http.post(PATHS[0], content=BODY, headers=headers))
            await fake.until(lambda: world.engine.num_live == 1)
            for path in (*PATHS, "/tokenize"):
                reader, writer = await asyncio.open_connection("127.0.0.1", world.ports.http_port)
                async with asyncio.timeout(10):
                    writer.write(head(path, CALM, len(BODY)))
                    status, told, body = await answer(reader)
                assert (status, told["retry-after"]) == (429, "1")
                assert "1 requests at once" in json.loads(body)["error"]["message"]
                writer.close()
            world.engine.stop_after_tokens = None
            assert (await held).status_code == 200
            assert (await http.post(PATHS[0], content=BODY, headers=headers)).status_code == 200
