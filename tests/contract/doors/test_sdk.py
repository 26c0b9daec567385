"""The SDK against the gateway's own gRPC door."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from antiphon.client import AsyncClient, Client, FinishReason
from antiphon.core.errors import ContextLengthExceeded, DeadlineExceeded, InvalidInput, Overloaded, UnknownModel

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path) as made:
        yield made


@pytest.fixture
async def client(world: fake.World) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(world.grpc_address) as made:
        yield made


async def test_a_stream_adds_up_to_the_engines_text(world: fake.World, client: AsyncClient) -> None:
    async with client.stream("tiny", prompt="The choir", max_tokens=20, seed=5) as stream:
        chunks = [chunk async for chunk in stream]
    tokens = world.tokens_of("The choir", 20, seed=5)
    assert "".join(chunk.text for chunk in chunks) == world.text_of(tokens)
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert stream.usage is not None
    assert stream.usage.num_completion_tokens == 20


async def test_the_blocking_client_gets_the_same_chat(world: fake.World) -> None:
    def ask() -> str:
        with Client(world.grpc_address) as client:
            messages = [{"role": "user", "content": "what is it?"}]
            return client.generate("tiny", messages=messages, max_tokens=12, seed=3).choices[0].text

    assert await asyncio.to_thread(ask) == world.text_of(world.chat_tokens_of("what is it?", 12, seed=3))


async def test_errors_come_as_what_they_are(client: AsyncClient) -> None:
    with pytest.raises(UnknownModel):
        await client.generate("nobody", prompt="x")
    with pytest.raises(ContextLengthExceeded):
        await client.generate("tiny", prompt="x " * 2000)
    with pytest.raises(InvalidInput) as caught:
        await client.generate("tiny", prompt="x", temperature=-1)
    assert caught.value.field == "sampling.temperature"


async def test_leaving_a_stream_frees_the_engine(world: fake.World, client: AsyncClient) -> None:
    world.engine.stop_after_tokens = 3
    async with client.stream("tiny", prompt="The choir", max_tokens=50) as stream:
        await anext(stream)
        assert world.engine.num_live == 1
    await fake.until(lambda: world.engine.num_live == 0)


async def test_a_deadline_ends_the_call_and_frees_the_engine(world: fake.World, client: AsyncClient) -> None:
    world.engine.stop_after_tokens = 3
    with pytest.raises(DeadlineExceeded):
        await client.generate("tiny", prompt="The choir", max_tokens=50, timeout_s=0.4)
    await fake.until(lambda: world.engine.num_live == 0)


async def test_an_overloaded_gateway_is_told_apart(tmp_path: Path) -> None:
    async with fake.world(tmp_path, max_num_seqs=1, max_queued=0) as world, AsyncClient(world.grpc_address) as client:
        world.engine.stop_after_tokens = 1
        async with client.stream("tiny", prompt="The choir", max_tokens=50) as stream:
            await anext(stream)
            with pytest.raises((Overloaded, DeadlineExceeded)):
                await client.generate("tiny", prompt="The choir", max_tokens=5, timeout_s=0.5)


async def test_models_and_status_are_seen(world: fake.World, client: AsyncClient) -> None:
    assert [(model.id, model.ready) for model in await client.list_models()] == [("tiny", True)]
    status = await client.status()
    assert [worker.worker_id for worker in status.workers] == [world.workers[0].info.worker_id]
