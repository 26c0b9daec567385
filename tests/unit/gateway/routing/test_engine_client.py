"""Connections to engines: opened, lost, replaced, dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import DeadlineExceeded, ErrorInfo, Overloaded, PeerLost, Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.rpc.engine.server import EngineServicer
from antiphon.rpc.engine.session import EngineSession
from antiphon.rpc.services import RpcServer

A = WorkerId("a")


class Engine:
    """Takes requests in, and gives a token each when told."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.aborted: list[RequestId] = []
        self.servicer = EngineServicer(self, loop=asyncio.get_running_loop())
        self.server = RpcServer([self.servicer], host="127.0.0.1")

    def submit(self, request: Request) -> None:
        if request.prompt_token_ids == (0,):
            raise Overloaded("full", retry_after_s=4.0)
        self.requests.append(request)

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)

    def give(self, token: int, finish: FinishReason | None = None, error: ErrorInfo | None = None) -> None:
        output = RequestOutput(request_id=self.requests[-1].request_id, new_token_ids=(token,), finish_reason=finish, error=error)
        self.servicer.deliver([output])

    def record(self, epoch: int = 1, role: Role = Role.DECODE) -> WorkerRecord:
        info = WorkerInfo(
            worker_id=A,
            deployment="d",
            pool="p",
            role=role,
            model="m",
            revision="r",
            fingerprint="f",
            epoch=Epoch(epoch),
            endpoint=Endpoint(rpc=self.server.address),
            pid=1,
            host="h",
            ready=True,
        )
        return WorkerRecord(info=info, age_s=0.0, lease_s=5.0)


class Clock:
    """Goes on only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def request(name: str = "r", prompt: tuple[int, ...] = (1,)) -> Request:
    return Request(request_id=RequestId(name), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=4))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def started() -> AsyncIterator[Engine]:
    engine = Engine()
    async with engine.server:
        yield engine


@asynccontextmanager
async def client_of(engine: Engine, clock: Clock | None = None) -> AsyncIterator[EngineClient]:
    client = EngineClient(open_timeout_s=2.0, silence_s=10.0, clock=clock or Clock())
    try:
        client.sync([engine.record()])
        await until(lambda: client.is_connected(A))
        yield client
    finally:
        await client.close()


async def collect(client: EngineClient, asked: Request) -> list[int]:
    async with aclosing(client.stream(A, asked, deadline_left_s=5.0)) as answers:
        return [token async for answer in answers for token in answer.output.new_token_ids]


async def test_a_request_is_streamed_to_its_finish() -> None:
    async with started() as engine, client_of(engine) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        assert client.inflight_on(A) == client.num_inflight == 1
        engine.give(7)
        engine.give(8, FinishReason.LENGTH)
        assert await reading == [7, 8]
        assert client.num_inflight == 0
        assert engine.aborted == []


async def test_leaving_early_aborts_at_the_engine() -> None:
    async with started() as engine, client_of(engine) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        reading.cancel()
        await until(lambda: engine.aborted == ["r"])
        assert client.num_inflight == 0


async def test_a_refusal_is_raised_as_the_engine_meant_it() -> None:
    async with started() as engine, client_of(engine) as client:
        with pytest.raises(Overloaded) as caught:
            await collect(client, request(prompt=(0,)))
        assert caught.value.retry_after_s == 4.0


async def test_the_engines_deadline_is_raised_as_one() -> None:
    async with started() as engine, client_of(engine) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        engine.give(1, FinishReason.ABORT, ErrorInfo(code="deadline_exceeded", message="deadline exceeded"))
        with pytest.raises(DeadlineExceeded):
            await reading


async def test_a_lost_session_fails_its_requests_and_is_opened_again() -> None:
    async with started() as engine, client_of(engine) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        engine.servicer.fail(Unavailable("the engine broke"))
        with pytest.raises(PeerLost, match="the engine broke"):
            await reading
        engine.servicer._failure = None
        await until(lambda: client.is_connected(A))


async def test_a_worker_started_anew_is_another_connection() -> None:
    async with started() as engine, client_of(engine) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        client.sync([engine.record(epoch=2)])
        with pytest.raises(PeerLost, match="anew"):
            await reading
        await until(lambda: client.is_connected(A))
        await until(lambda: engine.aborted == ["r"])


async def test_a_lease_that_ran_out_does_not_end_a_stream_that_lives() -> None:
    clock = Clock()
    async with started() as engine, client_of(engine, clock) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        client.sync([])
        assert client.is_connected(A)
        engine.give(7, FinishReason.LENGTH)
        assert await reading == [7]
        client.sync([])
        assert not client.is_connected(A)


async def test_a_worker_gone_from_the_directory_and_silent_is_lost() -> None:
    clock = Clock()
    async with started() as engine, client_of(engine, clock) as client:
        reading = asyncio.create_task(collect(client, request()))
        await until(lambda: bool(engine.requests))
        clock.now_s += 11.0
        client.sync([])
        with pytest.raises(PeerLost, match="gone"):
            await reading


async def test_workers_that_take_no_requests_get_no_session() -> None:
    async with started() as engine:
        client = EngineClient(clock=Clock())
        client.sync([engine.record(role=Role.PREFILL), engine.record(role=Role.FFN)])
        with pytest.raises(Unavailable):
            await collect(client, request())
        await client.close()


async def test_an_engine_nobody_reaches_is_unavailable_within_the_deadline() -> None:
    async with started() as engine:
        record = engine.record()
        await engine.server.close()
        client = EngineClient(open_timeout_s=0.2, clock=Clock())
        client.sync([record])
        with pytest.raises(Unavailable, match="no session"):
            await asyncio.wait_for(collect(client, request()), 5)
        await client.close()


async def test_a_connection_that_is_dropped_just_as_its_session_opens_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    opening, opened = asyncio.Event(), asyncio.Event()
    real = EngineSession.open

    async def open_(self: EngineSession, timeout_s: float) -> None:
        await real(self, timeout_s)
        opening.set()
        try:
            await opened.wait()
        except asyncio.CancelledError:
            return  # as wait_for of Python 3.11 does where what it waited for has come meanwhile

    monkeypatch.setattr(EngineSession, "open", open_)
    async with started() as engine:
        client = EngineClient(clock=Clock())
        client.sync([engine.record()])
        async with asyncio.timeout(20):
            await opening.wait()
            await client.close()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == f"engine session {A}"]


async def test_a_request_that_finds_its_connection_closed_is_told_and_does_not_wait() -> None:
    async with started() as engine, client_of(engine) as client:
        closing = asyncio.create_task(client.close())
        connection = client._connections[A]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await connection.wait_connected(5.0)
        await closing
