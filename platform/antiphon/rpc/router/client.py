"""Calls of the Router service of one replica (request speed). Must not know: what is asked, or which replica is next."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from antiphon.core.errors import Cancelled
from antiphon.rpc.channels import PartChannel
from antiphon.rpc.errors import closed_meanwhile, error_from_call
from antiphon.rpc.v1 import router_pb2 as pb
from antiphon.rpc.v1.router_pb2_grpc import RouterStub


class RouterCalls:
    """A connection to a router of this deployment at ``address`` (host:port); of one event loop. Raises errors of the tree."""

    def __init__(self, address: str) -> None:
        self._channel = PartChannel(address)

    @property
    def _stub(self) -> Any:
        return RouterStub(self._channel.now())  # type: ignore[no-untyped-call]

    async def route(self, request: pb.RouteRequest, timeout_s: float) -> pb.RouteDecision:
        """Decide."""
        answer: pb.RouteDecision = await self._call(self._stub.Route, request, timeout_s)
        return answer

    async def explain(self, request: pb.ExplainRequest, timeout_s: float) -> pb.ExplainResponse:
        """The record of a decision."""
        answer: pb.ExplainResponse = await self._call(self._stub.Explain, request, timeout_s)
        return answer

    async def feedback(self, request: pb.FeedbackRequest, timeout_s: float) -> None:
        """Note how good an answer was."""
        await self._call(self._stub.Feedback, request, timeout_s)

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._channel.close()

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from_call(error) from error
        except grpc.aio.UsageError as error:  # grpc's word for a closed channel
            raise Cancelled("the connection is closed") from error
        except asyncio.CancelledError:
            if closed_meanwhile():  # its replica left the directory
                raise Cancelled("the connection was closed") from None
            raise
