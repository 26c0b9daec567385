"""What each gRPC call has to be before its handler sees it: one key, let in; a message, in time and whole (request speed).

Every method is taken as a stream, since gRPC lets a method of one message wait for that as long as its client pleases, and says
UNKNOWN to bytes that are no message. Must not know: what the methods do.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from antiphon.core.errors import AntiphonError, DeadlineExceeded, InvalidInput
from antiphon.rpc.doors.crowd import RunningCalls
from antiphon.rpc.errors import status_of

READ_S: Final = 60.0  # from a call's headers to the end of its message, as a body of HTTP has
WRITE_S: Final = 60.0  # that a client may leave its one answer unread
SILENT_S: Final = 60.0  # between two messages of a stream that needs no key: whoever asks so has his next question at once
_LAST_WORD_S: Final = 1.0

Admit = Callable[[str | None], object]  # raises an error of the tree for an authorization that may not come in
Context = grpc.aio.ServicerContext[Any, Any]

_KEYLESS = tuple(f"/{name}/" for name in (HEALTH_SERVICE, reflection.SERVICE_NAME))


class Calls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Refuses who brings two keys, or a key that ``admit`` does not let in, before a byte of the message is waited for; bytes that
    are no message, as bad input; and who sends none in time. A call that got so far is told to ``running``.

    Args:
        running: Calls that were begun, health's and reflection's aside.
        admit: Refuses keys as soon as they are known; None = services see to that.
        is_public: Clients have ``READ_S`` for their first message; parts of the deployment, which have proven themselves, may wait.
    """

    def __init__(self, running: RunningCalls, admit: Admit | None = None, *, is_public: bool = False) -> None:
        self._running = running
        self._admit = admit
        self._read_s = READ_S if is_public else None

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """A handler that parses by itself."""
        handler = await continuation(handler_call_details)
        keys = [str(value) for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        if len(keys) > 1:
            return _TWO_KEYS  # what stands before this door may count another of them than we do
        is_keyless = handler_call_details.method.startswith(_KEYLESS)
        if self._admit is not None and handler is not None and not is_keyless:
            try:
                self._admit(keys[0] if keys else None)
            except AntiphonError as error:
                return _refusing(error)
        return None if handler is None else self._taken(handler, is_keyless=is_keyless)

    def _taken(self, handler: Any, *, is_keyless: bool) -> grpc.RpcMethodHandler[Any, Any]:
        parse = handler.request_deserializer or (lambda raw: raw)

        async def messages(context: Context) -> AsyncIterator[Any]:
            timeout_s = self._read_s
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        raw = await context.read()
                except TimeoutError:
                    raise DeadlineExceeded(f"no message came within {timeout_s:g} s") from None
                if raw is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs miss it
                    return
                timeout_s = SILENT_S if is_keyless else None  # other streams may be silent between two; their services see to it
                try:
                    yield parse(raw)
                except DecodeError as error:
                    raise InvalidInput(f"the bytes are no message: {error}") from None

        async def answer(context: Context) -> None:
            arriving = messages(context)
            message: Any = arriving
            if not handler.request_streaming:
                message = await anext(arriving, None)
                if message is None:
                    raise InvalidInput("the call has no message")
            with nullcontext() if is_keyless else self._running.of(context.peer()):
                if not handler.response_streaming:
                    response = await (handler.stream_unary or handler.unary_unary)(message, context)
                    await _write(response, context)
                    return
                responses = (handler.stream_stream or handler.unary_stream)(message, context)
                if not inspect.isasyncgen(responses):  # it writes by itself
                    await responses
                    return
                async for response in responses:
                    await context.write(response)

        async def call(_raws: object, context: Context) -> None:
            try:
                await answer(context)
            except (InvalidInput, DeadlineExceeded) as error:
                status = status_of(error)
                await context.abort(status.code, status.message, status.trailing_metadata)

        return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)


async def _write(response: Any, context: Context) -> None:
    try:
        async with asyncio.timeout(WRITE_S):
            await context.write(response)
    except TimeoutError:
        async with asyncio.timeout(_LAST_WORD_S):  # the status waits behind what is not read
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"the client has read nothing for {WRITE_S:g} s")


def _refusing(error: AntiphonError) -> grpc.RpcMethodHandler[Any, Any]:
    """Ends a call by its metadata alone."""
    status = status_of(error)

    async def refuse(_raws: object, context: Context) -> Any:
        await context.abort(status.code, status.message, status.trailing_metadata)

    return grpc.stream_unary_rpc_method_handler(refuse)


_TWO_KEYS = _refusing(InvalidInput("authorization may be given once"))
