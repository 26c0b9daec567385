"""gRPC doors and those who come and prove nothing: silent crowds, keys that open nothing, connections without a call."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from antiphon.core.errors import Unauthenticated
from antiphon.core.identity import Identity, new_key
from antiphon.directory.memory import MemoryDirectory
from antiphon.rpc import credentials, services
from antiphon.rpc.channels import open_channel, open_part_channel
from antiphon.rpc.directory.service import DirectoryServer
from antiphon.rpc.doors import calls
from antiphon.rpc.raw_stream import RawServer
from antiphon.rpc.services import RpcServer

CAP, CROWD = 24, 200
IDENTITY = Identity.parse(new_key())
Open = Callable[[], Any]


class _Echo:
    name = "test.Echo"

    def add_to(self, server: grpc.aio.Server) -> None:
        async def said(raw: bytes, _context: Any) -> bytes:
            return raw

        handlers = {"Say": grpc.unary_unary_rpc_method_handler(said)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.name, handlers),))


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_MAX_CONNECTIONS", CAP)


@asynccontextmanager
async def internal() -> AsyncIterator[int]:
    async with RpcServer([_Echo()], host="127.0.0.1", identity=IDENTITY) as server:
        yield server.port


@asynccontextmanager
async def public() -> AsyncIterator[int]:
    async with RpcServer([_Echo()], host="127.0.0.1", public=True) as server:
        yield server.port


@asynccontextmanager
async def directory() -> AsyncIterator[int]:
    server = await DirectoryServer.start(MemoryDirectory(), identity=IDENTITY)
    try:
        yield int(server.address.rpartition(":")[2])
    finally:
        await server.close()


@asynccontextmanager
async def data() -> AsyncIterator[int]:
    server = RawServer("127.0.0.1:0", lambda _stream: None, max_receive_bytes=1024, identity=IDENTITY)
    try:
        yield server.port
    finally:
        await asyncio.to_thread(server.close)


@contextmanager
def crowd(port: int) -> Iterator[None]:
    """Connections that say nothing."""
    held = []
    try:
        for _ in range(CROWD):
            held.append(socket.create_connection(("127.0.0.1", port), 10.0))
        yield
    finally:
        for each in held:
            each.close()


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("door", [internal, public, directory, data])
async def test_a_silent_crowd_has_no_more_than_its_share_of_the_files(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_HANDSHAKE_MS", 120_000)  # longer than this test looks
    async with door() as port:
        files = num_files()
        with crowd(port):  # both ends are this process
            await until(lambda: num_files() <= files + CROWD + CAP + 4)
            assert num_files() >= files + CROWD


METHODS = {
    internal: "/test.Echo/Say",
    public: "/test.Echo/Say",
    directory: "/antiphon.rpc.v1.Directory/ListWorkers",
    data: "/antiphon.transport.RawStream/Open",
}


@pytest.mark.parametrize("door", list(METHODS))
async def test_who_called_stays_beside_a_silent_crowd_and_who_comes_gets_in(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_HANDSHAKE_MS", 120_000)  # the crowd is not gone by itself while this test looks

    def channel(port: int) -> grpc.aio.Channel:
        address = f"127.0.0.1:{port}"
        return open_channel(address) if door is public else open_part_channel(address, identity=IDENTITY)

    async with door() as port, channel(port) as before:
        call = before.stream_stream(METHODS[door], None, None)(None)
        await call.write(b"")
        if door is not data:  # a stream that goes on
            await call.done_writing()
            assert await call.read() is not None
            assert await call.code() is grpc.StatusCode.OK
        with crowd(port):
            for _ in range(3):
                async with channel(port) as after:
                    await asyncio.wait_for(after.channel_ready(), 30)
            assert before.get_state() is grpc.ChannelConnectivity.READY


def _refusing(_authorization: str | None) -> None:
    raise Unauthenticated("no key of ours")


async def test_a_key_is_refused_before_its_message_is_there_and_health_needs_none() -> None:
    async with (
        RpcServer([_Echo()], host="127.0.0.1", public=True, admit=_refusing) as server,
        open_channel(server.address) as channel,
    ):
        call = channel.stream_unary("/test.Echo/Say", None, None)(None, timeout=20.0)  # it never writes
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await call.details() == "no key of ours"
        health = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        assert await health(b"", timeout=20.0)


async def test_a_connection_without_a_call_is_closed_and_its_client_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_IDLE_MS", 1_000)
    async with RpcServer([_Echo()], host="127.0.0.1", public=True) as server, open_channel(server.address) as channel:
        say = channel.unary_unary("/test.Echo/Say", None, None)
        assert await say(b"a", timeout=20.0) == b"a"
        await until(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        assert await say(b"b", timeout=20.0) == b"b"


async def test_a_call_without_its_message_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "READ_S", 0.3)
    async with RpcServer([_Echo()], host="127.0.0.1", public=True) as server, open_channel(server.address) as channel:
        for method in (
            "/test.Echo/Say",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            call = channel.stream_stream(method, None, None)(None, timeout=20.0)
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "no message came" in await call.details()
        call = channel.stream_stream("/test.Echo/Say", None, None)(None, timeout=20.0)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_of_reflection_that_asks_no_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SILENT_S", 0.3)
    async with RpcServer([_Echo()], host="127.0.0.1", public=True) as server, open_channel(server.address) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", None, None)(timeout=20.0)
        for _ in range(2):  # who goes on asking is answered
            await call.write(b"\x3a\x00")  # list_services
            assert b"test.Echo" in await call.read()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message came within 0.3 s" in await call.details()
