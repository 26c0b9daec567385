"""A gateway's end of one engine session (request speed).

Opens the stream, sends commands in order without waiting for the network, yields updates as they come, and turns every way in
which the stream can end into an error of the tree. Must not know: which requests travel on it, or what to do about a loss.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs miss it

from antiphon.core.errors import CorruptMessage, PeerLost, Unavailable
from antiphon.core.identity import Identity
from antiphon.core.request import Request, RequestId
from antiphon.rpc.channels import DEFAULT_LIMITS, ChannelLimits, open_part_channel, wait_until_connected
from antiphon.rpc.engine.codec import Answer, decode_update, encode_abort, encode_submit, encode_taken
from antiphon.rpc.engine.flow import Taken
from antiphon.rpc.errors import closed_meanwhile, error_from_call
from antiphon.rpc.health import answers_on
from antiphon.rpc.v1 import engine_pb2 as pb
from antiphon.rpc.v1 import engine_pb2_grpc


class EngineSession:
    """One open stream to one engine. Belongs to one event loop; ``close`` is idempotent."""

    def __init__(self, address: str, limits: ChannelLimits = DEFAULT_LIMITS, *, identity: Identity | None = None) -> None:
        self._address = address
        self._channel = open_part_channel(address, limits, identity=identity)
        self._call: Any = None
        self._commands: deque[pb.EngineCommand] = deque()
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self._taken = Taken()

    async def open(self, timeout_s: float) -> None:
        """Connect and wait until the engine has accepted the session.

        Raises:
            Unavailable: it did not within ``timeout_s`` seconds, or refused.
        """
        await wait_until_connected(self._channel, self._address, timeout_s)
        stub: Any = engine_pb2_grpc.EngineStub(self._channel)  # type: ignore[no-untyped-call]
        self._call = stub.Session()
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may swallow its task's cancellation
                await self._call.initial_metadata()
        except TimeoutError as error:
            raise Unavailable(f"engine at {self._address} did not accept the session within {timeout_s:g} s") from error
        except grpc.RpcError as error:
            raise Unavailable(f"engine at {self._address} refused the session: {error_from_call(error)}") from error
        if self._call.done():
            raise Unavailable(f"engine at {self._address} refused the session: {await self._call.details()}")
        self._writer = asyncio.create_task(self._write())
        self._send(encode_taken(0))

    def submit(self, request: Request, *, deadline_left_s: float | None) -> None:
        """Queue a submit; it is written in order. A loss shows in ``updates``."""
        self._send(encode_submit(request, deadline_left_s=deadline_left_s))

    def abort(self, request_id: RequestId) -> None:
        """Queue an abort."""
        self._send(encode_abort(request_id))

    async def updates(self) -> AsyncIterator[list[Answer]]:
        """What the engine's steps made, until the stream ends.

        Raises:
            PeerLost: the stream ended in any way but ``close``.
            CorruptMessage: an update that can't be right; nothing of the stream is worth reading any more.
        """
        while True:
            try:
                update = await self._call.read()
            except grpc.RpcError as error:
                raise PeerLost(self._address, str(error_from_call(error))) from error
            except asyncio.CancelledError:
                # grpc cancels readers of a call that was cancelled locally; a cancelled task goes on cancelling.
                if self._closed and closed_meanwhile():
                    return
                raise
            if update is EOF:
                if self._closed:
                    return
                raise PeerLost(self._address, "the engine ended the session")
            if update is None:  # what grpc gives for bytes that it could not read
                raise CorruptMessage(self._address, "it is no EngineUpdate")
            answers = decode_update(update, self._address)
            if num_updates := self._taken.took(len(answers)):
                self._send(encode_taken(num_updates))
            yield answers

    async def answers(self, timeout_s: float) -> bool:
        """Whether the worker's rpc server says anything within ``timeout_s`` seconds, also while its engine has nothing to say."""
        return await answers_on(self._channel, timeout_s)

    async def close(self) -> None:
        """End the stream; the engine aborts what is live on it."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    async def __aenter__(self) -> EngineSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _send(self, command: pb.EngineCommand) -> None:
        if not self._closed:
            self._commands.append(command)
            self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                while self._commands:
                    await self._call.write(self._commands.popleft())
                self._wake.clear()
                await self._wake.wait()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the call is over; ``updates`` says why
