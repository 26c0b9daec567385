"""The public Inference service over a port: parsing, statuses, cancellation (request speed).

Requests are parsed here and not by grpc, so that bytes which are no message (broken UTF-8, say) are refused as bad input.
Must not know: how a request is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from antiphon.core.errors import AntiphonError, DeadlineExceeded, InternalError, InvalidInput
from antiphon.rpc.errors import status_of
from antiphon.rpc.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)
_M = TypeVar("_M", bound=Message)
Announce = Callable[[Mapping[str, str]], Awaitable[None]]


WRITE_TIMEOUT_S: Final = 60.0  # that a client may take nothing of what is there for it
_LAST_WORD_S: Final = 1.0


class _NotReadingError(DeadlineExceeded):
    """Its answer is nobody's: what makes it is let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallInfo:
    """What came with a call besides its message."""

    metadata: Mapping[str, str]  # keys in lower case; binary values are left out
    deadline_left_s: float | None
    peer: str
    announce: Announce  # sends initial metadata; before the first response, once


class InferencePort(Protocol):
    """Who answers. Errors of the tree become statuses; closing ``generate``'s iterator cancels the request."""

    def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer."""
        ...

    async def list_models(self, request: pb.ListModelsRequest, call: CallInfo) -> pb.ListModelsResponse:
        """The models served here."""
        ...

    async def get_status(self, request: pb.GetStatusRequest, call: CallInfo) -> pb.GetStatusResponse:
        """Pools, workers and load."""
        ...

    async def embed(self, request: pb.EmbedRequest, call: CallInfo) -> pb.EmbedResponse:
        """Vectors."""
        ...

    async def score(self, request: pb.ScoreRequest, call: CallInfo) -> pb.ScoreResponse:
        """Scores."""
        ...


class InferenceServicer:
    """Serves antiphon.rpc.v1.Inference."""

    name = "antiphon.rpc.v1.Inference"

    def __init__(self, port: InferencePort, *, write_timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """``write_timeout_s``: how long a client may take nothing of what is there for it."""
        self._port = port
        self._write_timeout_s = write_timeout_s

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate, response_serializer=pb.GenerateResponse.SerializeToString
            ),
            "ListModels": _unary(pb.ListModelsRequest, self._port.list_models),
            "GetStatus": _unary(pb.GetStatusRequest, self._port.get_status),
            "Embed": _unary(pb.EmbedRequest, lambda request, call: self._port.embed(request, call)),
            "Score": _unary(pb.ScoreRequest, lambda request, call: self._port.score(request, call)),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.name, handlers),))

    async def _generate(self, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            request = _parse(pb.GenerateRequest, raw)
            async with aclosing(self._port.generate(request, _call_info(context))) as responses:
                async for response in responses:
                    await self._write(response, context)
        except _NotReadingError as error:
            async with asyncio.timeout(_LAST_WORD_S):  # the status waits behind what is not read
                await _abort(context, error)
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the caller gets a status and not a traceback
            await _abort(context, error)

    async def _write(self, response: pb.GenerateResponse, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """gRPC takes no more than a window of bytes ahead of its reader."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(response)
        except TimeoutError as error:
            raise _NotReadingError(f"the client has read nothing for {self._write_timeout_s:g} s") from error


def _unary(kind: type[_M], answer: Callable[[_M, CallInfo], Awaitable[Message]]) -> grpc.RpcMethodHandler[Any, Any]:
    async def call(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        try:
            return await answer(_parse(kind, raw), _call_info(context))
        except Exception as error:  # noqa: BLE001 - the door, as above
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(call, response_serializer=lambda message: message.SerializeToString())


def _parse(kind: type[_M], raw: bytes) -> _M:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"the request is not a valid {kind.DESCRIPTOR.full_name}; strings must be UTF-8") from error


def _call_info(context: grpc.aio.ServicerContext[Any, Any]) -> CallInfo:
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    left_s = context.time_remaining()

    async def announce(told: Mapping[str, str]) -> None:
        await context.send_initial_metadata(tuple(told.items()))

    return CallInfo(metadata=metadata, deadline_left_s=left_s, peer=context.peer(), announce=announce)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    if not isinstance(error, AntiphonError):
        _log.error("a call failed", exc_info=error)
        error = InternalError(str(error))
    status = status_of(error)
    await context.abort(status.code, status.message, status.trailing_metadata)
