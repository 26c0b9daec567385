"""The Router service over a port: parsing and statuses (request speed).

Must not know: how a decision is made.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from antiphon.core.errors import AntiphonError, InternalError, InvalidInput
from antiphon.rpc.errors import status_of
from antiphon.rpc.v1 import router_pb2 as pb

_log = logging.getLogger(__name__)
_M = TypeVar("_M", bound=Message)
_R = TypeVar("_R", bound=Message)


class RouterPort(Protocol):
    """Who decides. Errors of the tree become statuses. ``authorization`` is the call's metadata of that name."""

    async def route(self, request: pb.RouteRequest, authorization: str | None) -> pb.RouteDecision:
        """Decide."""
        ...

    async def explain(self, request: pb.ExplainRequest, authorization: str | None) -> pb.ExplainResponse:
        """The record of a decision."""
        ...

    async def feedback(self, request: pb.FeedbackRequest, authorization: str | None) -> pb.FeedbackResponse:
        """Note how good an answer was."""
        ...

    async def list_experts(self, request: pb.ListExpertsRequest, authorization: str | None) -> pb.ListExpertsResponse:
        """Experts and their state."""
        ...


class RouterServicer:
    """Serves antiphon.rpc.v1.Router."""

    name = "antiphon.rpc.v1.Router"

    def __init__(self, port: RouterPort) -> None:
        self._port = port

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        port = self._port
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Route": _unary(pb.RouteRequest, port.route),
            "Explain": _unary(pb.ExplainRequest, port.explain),
            "Feedback": _unary(pb.FeedbackRequest, port.feedback),
            "ListExperts": _unary(pb.ListExpertsRequest, port.list_experts),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.name, handlers),))


def _unary(kind: type[_M], answer: Callable[[_M, str | None], Awaitable[_R]]) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            try:
                request = kind.FromString(raw)
            except DecodeError as error:
                raise InvalidInput(f"the request is not a valid {kind.DESCRIPTOR.full_name}; strings must be UTF-8") from error
            metadata = dict(context.invocation_metadata() or ())
            authorization = metadata.get("authorization")
            answered = await answer(request, authorization if isinstance(authorization, str) else None)
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the caller gets a status and not a traceback
            if not isinstance(error, AntiphonError):
                _log.error("a call failed", exc_info=error)
                error = InternalError("internal error")
            status = status_of(error)
            await context.abort(status.code, status.message, status.trailing_metadata)
        return answered.SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)
