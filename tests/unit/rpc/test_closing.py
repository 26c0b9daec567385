"""A connection that is closed under a running call: the caller hears an error of the tree, and its task is not cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from antiphon.core.errors import AntiphonError, Cancelled, Unavailable
from antiphon.rpc.client_channel import AsyncInferenceCalls
from antiphon.rpc.credentials import server_credentials
from antiphon.rpc.directory.client import RemoteDirectory
from antiphon.rpc.router.client import RouterCalls
from antiphon.rpc.v1 import inference_pb2, router_pb2

DEADLINE_S = 20.0


class Silent(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic when it runs
    """Takes every call, unary or streaming, and answers none."""

    def __init__(self) -> None:
        self.took_one = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def never(_request: bytes, _context: object) -> bytes:
            self.took_one.set()
            await asyncio.Event().wait()
            return b""

        async def nothing(_request: bytes, _context: object) -> AsyncIterator[bytes]:
            yield await never(_request, _context)

        if details.method.endswith("/Generate"):
            return grpc.unary_stream_rpc_method_handler(nothing)
        return grpc.unary_unary_rpc_method_handler(never)


Made = tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[None]]]


def routing(address: str) -> Made:
    calls = RouterCalls(address)
    return lambda: calls.route(router_pb2.RouteRequest(), DEADLINE_S), calls.close


def listing(address: str) -> Made:
    calls = AsyncInferenceCalls(address, None)
    return lambda: calls.list_models(timeout_s=DEADLINE_S, metadata=()), calls.close


def streaming(address: str) -> Made:
    calls = AsyncInferenceCalls(address, None)
    return lambda: calls.generate(inference_pb2.GenerateRequest(), timeout_s=DEADLINE_S, metadata=()).receive(), calls.close


def looking(address: str) -> Made:
    directory = RemoteDirectory(address)
    return lambda: directory.workers("d"), directory.close


@contextlib.asynccontextmanager
async def silence(*, public: bool) -> AsyncIterator[tuple[Silent, str]]:
    silent, server = Silent(), grpc.aio.server()
    server.add_generic_rpc_handlers((silent,))
    port = server.add_insecure_port("127.0.0.1:0") if public else server.add_secure_port("127.0.0.1:0", server_credentials())
    await server.start()
    try:
        yield silent, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("make", "error"), [(routing, Cancelled), (listing, Cancelled), (streaming, Cancelled), (looking, Unavailable)]
)
async def test_a_call_whose_connection_is_closed_ends_with_an_error(
    make: Callable[[str], Made], error: type[AntiphonError]
) -> None:
    async with silence(public=make in (listing, streaming)) as (silent, address):
        call, close = make(address)
        running = asyncio.ensure_future(call())
        await asyncio.wait_for(silent.took_one.wait(), DEADLINE_S)
        await close()
        with pytest.raises(error):
            await asyncio.wait_for(running, DEADLINE_S)


@pytest.mark.parametrize("make", [routing, listing, streaming, looking])
async def test_a_cancelled_task_goes_on_cancelling(make: Callable[[str], Made]) -> None:
    async with silence(public=make in (listing, streaming)) as (silent, address):
        call, close = make(address)
        running = asyncio.ensure_future(call())
        await asyncio.wait_for(silent.took_one.wait(), DEADLINE_S)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, DEADLINE_S)
        await close()
