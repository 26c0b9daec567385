"""Sessions between a gateway and an engine, over a loopback socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from antiphon.core.errors import InternalError, Overloaded, PeerLost, Unavailable
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams
from antiphon.rpc.channels import open_part_channel
from antiphon.rpc.engine.codec import Answer, decode_update, encode_submit, encode_taken
from antiphon.rpc.engine.server import EngineServicer
from antiphon.rpc.engine.session import EngineSession
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import engine_pb2_grpc


class RecordingEngine:
    """Takes requests in, and nothing else."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.refuse: Overloaded | None = None

    def submit(self, request: Request) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(request)

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)


def request(name: str) -> Request:
    return Request(request_id=RequestId(name), prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=4))


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[RecordingEngine, EngineServicer, RpcServer]]:
    engine = RecordingEngine()
    servicer = EngineServicer(engine, loop=asyncio.get_running_loop())
    async with RpcServer([servicer], host="127.0.0.1") as server:
        yield engine, servicer, server


@asynccontextmanager
async def session_to(server: RpcServer) -> AsyncIterator[EngineSession]:
    async with EngineSession(server.address) as session:
        await session.open(5.0)
        yield session


async def next_update(session: EngineSession) -> list[Answer]:
    async with asyncio.timeout(5.0):
        return await anext(session.updates())


async def test_a_submitted_request_reaches_the_engine() -> None:
    async with serving() as (engine, _, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        await until(lambda: bool(engine.submitted))
        assert engine.submitted[0].prompt_token_ids == (1, 2)


async def test_a_steps_outputs_from_another_thread_come_in_one_update() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        session.submit(request("b"), deadline_left_s=None)
        await until(lambda: len(engine.submitted) == 2)
        step = [RequestOutput(request_id=RequestId(name), new_token_ids=(7,)) for name in "ab"]
        thread = threading.Thread(target=servicer.deliver, args=(step,))
        thread.start()
        update = await next_update(session)
        thread.join()
        assert [answer.output.request_id for answer in update] == ["a", "b"]


async def test_each_gateway_gets_only_its_own_requests() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as first, session_to(server) as second:
        first.submit(request("a"), deadline_left_s=None)
        second.submit(request("b"), deadline_left_s=None)
        await until(lambda: len(engine.submitted) == 2)
        servicer.deliver([RequestOutput(request_id=RequestId(name), new_token_ids=(7,)) for name in "ab"])
        assert [answer.output.request_id for answer in await next_update(first)] == ["a"]
        assert [answer.output.request_id for answer in await next_update(second)] == ["b"]


async def test_a_session_that_ends_aborts_its_live_requests_only() -> None:
    async with serving() as (engine, servicer, server):
        async with session_to(server) as session:
            session.submit(request("done"), deadline_left_s=None)
            session.submit(request("live"), deadline_left_s=None)
            await until(lambda: len(engine.submitted) == 2)
            servicer.deliver([RequestOutput(request_id=RequestId("done"), finish_reason=FinishReason.STOP)])
            await next_update(session)
        await until(lambda: servicer.num_sessions == 0)
        assert engine.aborted == ["live"]
        assert servicer.num_requests == 0


async def test_an_abort_reaches_the_engine_and_its_late_outputs_are_dropped() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        session.abort(RequestId("a"))
        session.submit(request("b"), deadline_left_s=None)
        await until(lambda: len(engine.submitted) == 2)
        assert engine.aborted == ["a"]
        servicer.deliver([RequestOutput(request_id=RequestId("a"), new_token_ids=(1,))])
        servicer.deliver([RequestOutput(request_id=RequestId("b"), new_token_ids=(1,))])
        assert [answer.output.request_id for answer in await next_update(session)] == ["b"]


async def test_a_gateway_cannot_abort_anothers_request() -> None:
    async with serving() as (engine, _, server), session_to(server) as first, session_to(server) as second:
        first.submit(request("a"), deadline_left_s=None)
        await until(lambda: len(engine.submitted) == 1)
        second.abort(RequestId("a"))
        second.submit(request("b"), deadline_left_s=None)
        await until(lambda: len(engine.submitted) == 2)
        assert engine.aborted == []


async def test_a_refusal_comes_back_with_its_reason() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        engine.refuse = Overloaded("full", retry_after_s=3.0)
        session.submit(request("a"), deadline_left_s=None)
        (answer,) = await next_update(session)
        assert isinstance(answer.error, Overloaded)
        assert answer.error.retry_after_s == 3.0
        assert servicer.num_requests == 0


async def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        session.submit(request("a"), deadline_left_s=None)
        (answer,) = await next_update(session)
        assert "in use" in str(answer.error)
        assert len(engine.submitted) == 1
        assert servicer.num_requests == 1


async def test_a_broken_engine_ends_its_sessions_with_the_reason() -> None:
    async with serving() as (_, servicer, server), session_to(server) as session:
        servicer.fail(Unavailable("draining"))
        with pytest.raises(PeerLost, match="draining"):
            await next_update(session)


async def test_a_broken_engine_refuses_new_sessions() -> None:
    async with serving() as (_, servicer, server):
        servicer.fail(InternalError("x"))
        await asyncio.sleep(0)

        async def use() -> None:
            async with session_to(server) as session:
                await next_update(session)

        with pytest.raises((Unavailable, PeerLost)):
            await use()


async def test_a_server_that_goes_away_is_a_lost_peer() -> None:
    async with serving() as (_, _servicer, server), session_to(server) as session:
        waiting = asyncio.create_task(next_update(session))
        await asyncio.sleep(0)
        await server.close()
        with pytest.raises(PeerLost):
            await waiting


async def test_an_address_where_nobody_listens_is_unavailable_within_the_deadline() -> None:
    async with serving() as (_, _servicer, server):
        address = server.address
        await server.close()
        async with EngineSession(address) as session:
            with pytest.raises(Unavailable, match="no connection"):
                await session.open(0.3)


async def test_closing_a_session_ends_its_updates_quietly() -> None:
    async with serving() as (_, _servicer, server), session_to(server) as session:

        async def read_all() -> int:
            return len([update async for update in session.updates()])

        reading = asyncio.create_task(read_all())
        await asyncio.sleep(0)  # the reader gets as far as its first wait
        await session.close()
        async with asyncio.timeout(5.0):
            assert await reading == 0


async def test_what_a_slow_gateway_missed_arrives_in_order() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        await until(lambda: bool(engine.submitted))
        for token in range(50):
            servicer.deliver([RequestOutput(request_id=RequestId("a"), new_token_ids=(token,))])
        seen: list[int] = []
        while len(seen) < 50:
            seen += [token for answer in await next_update(session) for token in answer.output.new_token_ids]
        assert seen == list(range(50))


async def delivered(servicer: EngineServicer, num_steps: int, first: int = 0) -> None:
    """Steps of one token each, far faster than anybody reads."""
    for token in range(first, first + num_steps):
        servicer.deliver([RequestOutput(request_id=RequestId("a"), new_token_ids=(token,))])
        await asyncio.sleep(0)


async def test_an_engine_is_a_few_updates_ahead_of_its_gateway_and_no_more() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        await until(lambda: bool(engine.submitted))
        await delivered(servicer, 200)
        seen: list[int] = []
        num_updates = 0
        while len(seen) < 200:
            num_updates += 1
            seen += [token for answer in await next_update(session) for token in answer.output.new_token_ids]
        assert seen == list(range(200))
        assert num_updates <= 8  # what was on its way, and all that had gathered meanwhile in one


async def test_tokens_go_on_for_as_long_as_a_gateway_takes_them() -> None:
    async with serving() as (engine, servicer, server), session_to(server) as session:
        session.submit(request("a"), deadline_left_s=None)
        await until(lambda: bool(engine.submitted))
        making = asyncio.create_task(delivered(servicer, 2000))
        seen: list[int] = []
        while len(seen) < 2000:
            seen += [token for answer in await next_update(session) for token in answer.output.new_token_ids]
        await making
        assert seen == list(range(2000))


async def test_a_gateway_that_does_not_tell_what_it_takes_gets_every_step() -> None:
    """One of an older version, while a deployment is rolled over."""
    async with serving() as (engine, servicer, server), open_part_channel(server.address) as channel:
        call = engine_pb2_grpc.EngineStub(channel).Session()  # type: ignore[no-untyped-call]
        await call.write(encode_submit(request("a"), deadline_left_s=None))
        await until(lambda: bool(engine.submitted))
        seen: list[int] = []
        for token in range(100):
            servicer.deliver([RequestOutput(request_id=RequestId("a"), new_token_ids=(token,))])
            if token % 10 == 9:
                while len(seen) <= token:
                    async with asyncio.timeout(5.0):
                        seen += [t for answer in decode_update(await call.read(), "w") for t in answer.output.new_token_ids]
        assert seen == list(range(100))
        call.cancel()


@pytest.mark.parametrize("tells", [True, False])
async def test_a_gateway_that_reads_nothing_is_let_go_and_its_requests_end(tells: bool) -> None:
    engine = RecordingEngine()
    servicer = EngineServicer(engine, loop=asyncio.get_running_loop(), unread_s=0.3)
    async with RpcServer([servicer], host="127.0.0.1") as server, open_part_channel(server.address) as channel:
        call = engine_pb2_grpc.EngineStub(channel).Session()  # type: ignore[no-untyped-call]
        if tells:
            await call.write(encode_taken(0))
        await call.write(encode_submit(request("a"), deadline_left_s=None))
        await until(lambda: bool(engine.submitted))
        await call.done_writing() if tells else None  # half closed, or open: neither reads
        many = tuple(range(50_000))
        async with asyncio.timeout(10.0):
            while not engine.aborted:
                servicer.deliver([RequestOutput(request_id=RequestId("a"), new_token_ids=many)])
                await asyncio.sleep(0.01)
        assert engine.aborted == ["a"]
        await until(lambda: servicer.num_sessions == 0)
