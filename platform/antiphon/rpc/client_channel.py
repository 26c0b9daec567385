"""Calls of the public Inference service from outside: channels, TLS, metadata, errors of our tree (request speed).

What is raised here is always an error of ``core.errors``. Where the server did not say when to come back, the error's
``retry_after_s`` is 0. Must not know: what is asked, or when to try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from antiphon.core.errors import AntiphonError, Cancelled, Overloaded, Unavailable
from antiphon.rpc.channels import channel_options
from antiphon.rpc.errors import CODE_KEY, RETRY_AFTER_KEY, closed_meanwhile, error_from_call, unreachable
from antiphon.rpc.v1 import inference_pb2 as pb
from antiphon.rpc.v1.inference_pb2_grpc import InferenceStub

Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How to trust the server, and be trusted by it; all PEM."""

    root_certificates: bytes | None = None  # None = the system's
    private_key: bytes | None = None  # with certificate_chain: mutual TLS
    certificate_chain: bytes | None = None
    server_name: str | None = None  # name in the server's certificate; None = the address's host


class ResponseStream:
    """The responses of one running call. One thread iterates; any thread may cancel."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    def receive(self) -> pb.GenerateResponse | None:
        """The next response; None = the call ended well. Raises what the call failed with."""
        try:
            return next(self._call)  # type: ignore[no-any-return]
        except StopIteration:
            return None
        except grpc.RpcError as error:
            raise _translated(error, self._address) from error

    def routed(self) -> dict[str, str]:
        """Who answers for a composition, and why; once a response has come."""
        return _routed(self._call.initial_metadata())

    def cancel(self) -> None:
        """End the call; the server sees it. Idempotent."""
        self._call.cancel()


class AsyncResponseStream:
    """The responses of one running call, for one task."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._cancelled = False

    async def receive(self) -> pb.GenerateResponse | None:
        """The next response; None = the call ended well. Raises what the call failed with."""
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            raise _translated(error, self._address) from error
        except asyncio.CancelledError:
            if self._cancelled or closed_meanwhile():  # by cancel() below or close(), not the task
                raise Cancelled("the call was cancelled") from None
            self._call.cancel()
            raise
        return None if response is grpc.aio.EOF else response  # type: ignore[attr-defined]

    async def routed(self) -> dict[str, str]:
        """Who answers for a composition, and why; once a response has come."""
        return _routed(await self._call.initial_metadata())

    def cancel(self) -> None:
        """End the call; the server sees it. Idempotent."""
        self._cancelled = True
        self._call.cancel()


class InferenceCalls:
    """A blocking connection to one server; connects lazily and again after a loss. Any thread may call."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self._address = address
        self._channel = open_client_channel(address, tls)
        self._stub: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float, metadata: Metadata) -> ResponseStream:
        """Start a call; its errors come with its responses."""
        try:
            return ResponseStream(self._stub.Generate(request, timeout=timeout_s, metadata=metadata), self._address)
        except ValueError as error:  # grpc's word for a closed channel
            raise Cancelled("the connection is closed") from error

    def list_models(self, *, timeout_s: float, metadata: Metadata) -> pb.ListModelsResponse:
        """The models served."""
        response: pb.ListModelsResponse = self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout_s, metadata)
        return response

    def embed(self, request: pb.EmbedRequest, *, timeout_s: float, metadata: Metadata) -> pb.EmbedResponse:
        """Vectors."""
        response: pb.EmbedResponse = self._unary(self._stub.Embed, request, timeout_s, metadata)
        return response

    def score(self, request: pb.ScoreRequest, *, timeout_s: float, metadata: Metadata) -> pb.ScoreResponse:
        """Scores."""
        response: pb.ScoreResponse = self._unary(self._stub.Score, request, timeout_s, metadata)
        return response

    def get_status(self, deployment: str, *, timeout_s: float, metadata: Metadata) -> pb.GetStatusResponse:
        """Pools, workers and load."""
        request = pb.GetStatusRequest(deployment=deployment)
        response: pb.GetStatusResponse = self._unary(self._stub.GetStatus, request, timeout_s, metadata)
        return response

    def close(self) -> None:
        """Close the connection; running calls end as Cancelled. Idempotent."""
        self._channel.close()

    def _unary(self, method: Any, request: Any, timeout_s: float, metadata: Metadata) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _translated(error, self._address) from error
        except ValueError as error:  # grpc's word for a closed channel
            raise Cancelled("the connection is closed") from error


class AsyncInferenceCalls:
    """The same for asyncio; belongs to the event loop that makes its first call."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self._address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._made_stub: Any = None

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float, metadata: Metadata) -> AsyncResponseStream:
        """Start a call; its errors come with its responses."""
        try:
            return AsyncResponseStream(self._stub().Generate(request, timeout=timeout_s, metadata=metadata), self._address)
        except grpc.aio.UsageError as error:
            raise Cancelled("the connection is closed") from error

    async def list_models(self, *, timeout_s: float, metadata: Metadata) -> pb.ListModelsResponse:
        """The models served."""
        response: pb.ListModelsResponse = await self._unary(self._stub().ListModels, pb.ListModelsRequest(), timeout_s, metadata)
        return response

    async def embed(self, request: pb.EmbedRequest, *, timeout_s: float, metadata: Metadata) -> pb.EmbedResponse:
        """Vectors."""
        response: pb.EmbedResponse = await self._unary(self._stub().Embed, request, timeout_s, metadata)
        return response

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, metadata: Metadata) -> pb.ScoreResponse:
        """Scores."""
        response: pb.ScoreResponse = await self._unary(self._stub().Score, request, timeout_s, metadata)
        return response

    async def get_status(self, deployment: str, *, timeout_s: float, metadata: Metadata) -> pb.GetStatusResponse:
        """Pools, workers and load."""
        request = pb.GetStatusRequest(deployment=deployment)
        response: pb.GetStatusResponse = await self._unary(self._stub().GetStatus, request, timeout_s, metadata)
        return response

    async def close(self) -> None:
        """Close the connection; running calls end as Cancelled. Idempotent."""
        if self._channel is not None:
            await self._channel.close()  # type: ignore[call-arg]

    def _stub(self) -> Any:
        if self._made_stub is None:
            options = _options(self._tls)
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self._address, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self._address, _credentials(self._tls), options=options)
            self._made_stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._made_stub

    async def _unary(self, method: Any, request: Any, timeout_s: float, metadata: Metadata) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _translated(error, self._address) from error
        except grpc.aio.UsageError as error:
            raise Cancelled("the connection is closed") from error
        except asyncio.CancelledError:
            if closed_meanwhile():
                raise Cancelled("the connection was closed") from None
            raise


def open_client_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """A blocking channel to a gateway, by TLS where it is given; connects lazily and again after a loss."""
    options = _options(tls)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, _credentials(tls), options=options)


def _routed(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata or () if key.startswith("x-antiphon-") and isinstance(value, str)}


def _options(tls: Tls | None) -> list[tuple[str, int | str]]:
    options = channel_options()
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def _translated(error: grpc.RpcError, address: str) -> AntiphonError:
    translated = error_from_call(error)
    if isinstance(translated, Overloaded | Unavailable):
        call: Any = error
        trailing = dict((call.trailing_metadata() or ()) if hasattr(call, "trailing_metadata") else ())
        words = None if CODE_KEY in trailing else unreachable(address, str(translated))
        if words is not None and isinstance(translated, Unavailable):  # grpc said it, not the server
            translated = Unavailable(words, translated.retry_after_s)
        if RETRY_AFTER_KEY not in trailing:
            translated.retry_after_s = 0.0
    return translated
