"""The engine's end of sessions: from gateways' streams to a thread-safe engine and back (request speed; ``deliver`` once a step).

    gateway A ══ stream ══╗                     ┌── submit, abort ──► EnginePort (the engine's own thread)
    gateway B ══ stream ══╬══ EngineServicer ◄──┴── deliver(outputs of one step)

Whatever a step made for one gateway leaves in one EngineUpdate; a gateway that reads slowly gets several steps' in one
(``rpc.engine.flow``), and one that reads nothing for a minute is let go. When a stream ends, for whatever reason, all its live
requests are aborted.

Must not know: how requests are scheduled or computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import grpc.aio

from antiphon.core.errors import AntiphonError, DeadlineExceeded, InvalidInput
from antiphon.core.request import Request, RequestId, RequestOutput
from antiphon.rpc.engine.codec import decode_submit, encode_refusal, encode_update
from antiphon.rpc.engine.flow import Window, together
from antiphon.rpc.errors import status_of
from antiphon.rpc.v1 import engine_pb2 as pb
from antiphon.rpc.v1 import engine_pb2_grpc

UNREAD_S: Final = 60.0
_LAST_WORD_S: Final = 1.0


class EnginePort(Protocol):
    """What the servicer needs of an engine. Both calls are thread-safe and never block."""

    def submit(self, request: Request) -> None:
        """Take a request in. Raises an error of the tree to refuse it, e.g. Overloaded."""
        ...

    def abort(self, request_id: RequestId) -> None:
        """Stop a request and free what it holds within a step; unknown ids are ignored."""
        ...


@dataclass(slots=True, eq=False)
class _Session:
    live: set[RequestId] = field(default_factory=set)
    outputs: list[RequestOutput] = field(default_factory=list)  # of steps not yet sent
    refusals: list[pb.EngineUpdate] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    window: Window = field(default_factory=Window)
    heard_s: float = 0.0  # on the loop's clock: when the gateway last took something, or had nothing to take
    ended: bool = False  # the gateway closed its half


class EngineServicer:
    """Serves antiphon.rpc.v1.Engine. All state belongs to the event loop; only ``deliver`` and ``fail`` may be called elsewhere."""

    name = "antiphon.rpc.v1.Engine"

    def __init__(
        self,
        port: EnginePort,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[Request], None] | None = None,
        unread_s: float = UNREAD_S,
    ) -> None:
        """``prepare`` makes a request with rules ready in another thread, before the engine sees it. ``unread_s``: how long a
        gateway may take nothing of what is there for it.
        """
        self._unread_s = unread_s
        self._port = port
        self._prepare = prepare
        self._preparing: set[asyncio.Task[None]] = set()
        self._loop = loop
        self._clock = clock
        self._owners: dict[RequestId, _Session] = {}
        self._sessions: set[_Session] = set()
        self._failure: AntiphonError | None = None

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def num_requests(self) -> int:
        """Requests of all sessions that have not finished."""
        return len(self._owners)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Send what one step made, from any thread; never blocks. Outputs of requests nobody waits for are dropped."""
        if outputs:
            self._call_on_loop(self._dispatch, tuple(outputs))

    def fail(self, error: AntiphonError) -> None:
        """The engine is broken or closing: end all sessions with ``error``, refuse new ones. From any thread."""
        self._call_on_loop(self._fail, error)

    async def Session(  # noqa: N802 - the method's name in the proto
        self, commands: AsyncIterator[pb.EngineCommand], context: grpc.aio.ServicerContext[pb.EngineCommand, pb.EngineUpdate]
    ) -> None:
        """One gateway's stream; see the proto."""
        session = _Session()
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, commands))
        try:
            await context.send_initial_metadata(())
            try:
                await self._write(session, context)
            except TimeoutError:
                self._leave(session)
                async with asyncio.timeout(_LAST_WORD_S):  # the status waits behind what is not read
                    await _end(context, DeadlineExceeded(f"nothing of this session's updates was taken for {self._unread_s:g} s"))
            if self._failure is not None:
                await _end(context, self._failure)
            await reader  # raises what ended it
        finally:
            reader.cancel()
            self._leave(session)

    def _leave(self, session: _Session) -> None:
        self._sessions.discard(session)
        for request_id in session.live:
            self._owners.pop(request_id, None)
            self._port.abort(request_id)
        session.live.clear()

    async def _read(self, session: _Session, commands: AsyncIterator[pb.EngineCommand]) -> None:
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "submit":
                        self._submit(session, command.submit)
                    case "abort":
                        self._abort(session, RequestId(command.abort.request_id))
                    case "taken":
                        session.window.taken(command.taken.num_updates)
                        session.heard_s = self._loop.time()
                        session.wake.set()
        finally:
            session.ended = True
            session.wake.set()

    async def _write(self, session: _Session, context: grpc.aio.ServicerContext[pb.EngineCommand, pb.EngineUpdate]) -> None:
        while not session.ended and self._failure is None:
            async with asyncio.timeout_at(None if session.window.is_open else session.heard_s + self._unread_s):
                await session.wake.wait()
            session.wake.clear()
            if not session.window.is_open:
                continue
            outputs, session.outputs = session.outputs, []
            refusals, session.refusals = session.refusals, []
            if outputs or refusals:
                update = encode_update(together(outputs))
                for refusal in refusals:
                    update.MergeFrom(refusal)
                session.heard_s = self._loop.time()
                session.window.wrote(len(update.requests))  # before it is: the gateway may have taken it when this goes on
                async with asyncio.timeout(self._unread_s):
                    await context.write(update)

    def _submit(self, session: _Session, submit: pb.SubmitCommand) -> None:
        request = decode_submit(submit, now_s=self._clock())
        request_id = request.request_id
        if request_id in self._owners:
            error: AntiphonError = InvalidInput(f"request id {request_id} is in use", "request_id")
            session.refusals.append(encode_refusal(request_id, error))
            session.wake.set()
            return
        self._owners[request_id] = session
        session.live.add(request_id)
        if self._prepare is None or request.sampling.rules is None:
            self._hand_over(session, request)
            return
        task = self._loop.create_task(self._hand_over_prepared(session, request, self._prepare))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _hand_over_prepared(self, session: _Session, request: Request, prepare: Callable[[Request], None]) -> None:
        try:
            await asyncio.to_thread(prepare, request)
        except AntiphonError as refused:
            self._refuse(session, request.request_id, refused)
            return
        if self._owners.get(request.request_id) is session:  # not aborted meanwhile
            self._hand_over(session, request)

    def _hand_over(self, session: _Session, request: Request) -> None:
        try:
            self._port.submit(request)
        except AntiphonError as refused:
            self._refuse(session, request.request_id, refused)

    def _refuse(self, session: _Session, request_id: RequestId, refused: AntiphonError) -> None:
        if self._owners.get(request_id) is session:
            del self._owners[request_id]
            session.live.discard(request_id)
            session.refusals.append(encode_refusal(request_id, refused))
            session.wake.set()

    def _abort(self, session: _Session, request_id: RequestId) -> None:
        if self._owners.get(request_id) is session:
            del self._owners[request_id]
            session.live.discard(request_id)
            self._port.abort(request_id)

    def _dispatch(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            session = self._owners.get(output.request_id)
            if session is None:
                continue
            session.outputs.append(output)
            session.wake.set()
            if output.finish_reason is not None:
                del self._owners[output.request_id]
                session.live.discard(output.request_id)

    def _fail(self, error: AntiphonError) -> None:
        if self._failure is None:
            self._failure = error
        for session in self._sessions:
            session.wake.set()

    def _call_on_loop(self, call: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, argument)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The loop is gone and every session with it: nobody is left to tell.


async def _end(context: grpc.aio.ServicerContext[pb.EngineCommand, pb.EngineUpdate], error: AntiphonError) -> None:
    """End a session with an error; does not return."""
    status = status_of(error)
    await context.abort(status.code, status.message, status.trailing_metadata)
