"""The Experts service: a worker's or a gateway's end over a port, and who calls it (control speed).

Must not know: what a placement means, who balances, or how experts are read.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from antiphon.core.errors import AntiphonError, InternalError, InvalidInput
from antiphon.core.identity import own_identity
from antiphon.rpc.channels import PartChannel, channel_options
from antiphon.rpc.client_channel import Tls, open_client_channel
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.rpc.errors import error_from_call, status_of
from antiphon.rpc.v1 import experts_pb2 as pb
from antiphon.rpc.v1.experts_pb2_grpc import ExpertsStub

_log = logging.getLogger(__name__)
_M = TypeVar("_M", bound=Message)

SERVICE = "antiphon.rpc.v1.Experts"
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Rows that each expert had, and the placement in use."""

    deployment: str
    placement_number: int
    placement_json: str  # empty where experts are not spread over workers
    rows: Mapping[int, tuple[int, ...]]  # by layer number on the wire, by expert


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceWish:
    """Move experts now."""

    deployment: str = ""
    placement_json: str = ""  # the placement to bring in; empty = balance by the rows seen
    num_redundant: int | None = None  # copies beyond the first, per layer; None = as the document says


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceStep:
    """One phase of bringing a placement in; see the proto."""

    phase: str  # HOLD, USE or RELEASE
    number: int
    placement_json: str


class ExpertsPort(Protocol):
    """Who answers. Errors of the tree become statuses. ``metadata`` is the call's, keys in lower case."""

    async def expert_load(self, deployment: str, metadata: Mapping[str, str]) -> ExpertLoad:
        """Rows by layer and expert."""
        ...

    async def rebalance(self, wish: RebalanceWish, metadata: Mapping[str, str]) -> str:
        """Take the wish, or pass it on; the id of the worker that will do it."""
        ...

    async def place(self, step: PlaceStep, metadata: Mapping[str, str]) -> bool:
        """One phase; True when it is done, else ask again."""
        ...


class ExpertsServicer:
    """Serves antiphon.rpc.v1.Experts."""

    name = SERVICE

    def __init__(self, port: ExpertsPort) -> None:
        self._port = port

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        methods: dict[str, Callable[[bytes, Mapping[str, str]], Awaitable[Message]]] = {
            "GetExpertLoad": self._load,
            "Rebalance": self._rebalance,
            "Place": self._place,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(_door(method), response_serializer=_serialized)
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.name, handlers),))

    async def _load(self, raw: bytes, metadata: Mapping[str, str]) -> Message:
        request = _parse(pb.GetExpertLoadRequest, raw)
        found = await self._port.expert_load(request.deployment, metadata)
        return pb.GetExpertLoadResponse(
            deployment=found.deployment,
            placement_number=found.placement_number,
            placement_json=found.placement_json,
            layers=[pb.LayerRows(layer=layer, rows=rows) for layer, rows in sorted(found.rows.items())],
        )

    async def _rebalance(self, raw: bytes, metadata: Mapping[str, str]) -> Message:
        request = _parse(pb.RebalanceRequest, raw)
        wish = RebalanceWish(
            deployment=request.deployment,
            placement_json=request.placement_json,
            num_redundant=request.num_redundant if request.HasField("num_redundant") else None,
        )
        return pb.RebalanceResponse(worker_id=await self._port.rebalance(wish, metadata))

    async def _place(self, raw: bytes, metadata: Mapping[str, str]) -> Message:
        request = _parse(pb.PlaceRequest, raw)
        phase = pb.PlaceRequest.Phase.Name(request.phase) if request.phase in pb.PlaceRequest.Phase.values() else ""
        step = PlaceStep(phase=phase, number=request.number, placement_json=request.placement_json)
        return pb.PlaceResponse(done=await self._port.place(step, metadata))


class ExpertsCalls:
    """Blocking calls to one worker or gateway; connects lazily and again after a loss. Any thread may call.

    Raises errors of the tree: Unavailable while nobody answers at the address.
    """

    def __init__(
        self, address: str, *, tls: Tls | None = None, metadata: Metadata = (), timeout_s: float = 5.0, worker: bool = False
    ) -> None:
        """``worker``: the address is a worker's of this deployment, not a gateway's."""
        self._identity = own_identity() if worker else None
        self._channel = (
            grpc.secure_channel(address, channel_credentials(self._identity), options=[*channel_options(), *TARGET_OPTIONS])
            if worker
            else open_client_channel(address, tls)
        )
        self._stub: Any = ExpertsStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = metadata
        self._timeout_s = timeout_s

    @property
    def is_outdated(self) -> bool:
        """Whether the deployment's keys have changed since: a new connection needs new calls."""
        return self._identity is not None and self._identity is not own_identity()

    def expert_load(self, deployment: str = "") -> ExpertLoad:
        """See ``ExpertsPort``."""
        return _load_of(self._call(self._stub.GetExpertLoad, pb.GetExpertLoadRequest(deployment=deployment)))

    def rebalance(self, wish: RebalanceWish) -> str:
        """See ``ExpertsPort``."""
        worker_id: str = self._call(self._stub.Rebalance, _wish(wish)).worker_id
        return worker_id

    def place(self, step: PlaceStep) -> bool:
        """See ``ExpertsPort``."""
        request = pb.PlaceRequest(phase=step.phase, number=step.number, placement_json=step.placement_json)
        return bool(self._call(self._stub.Place, request).done)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def _call(self, method: Any, request: Message) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_call(error) from error


class AsyncExpertsCalls:
    """The same for asyncio, to workers of this deployment: belongs to one event loop."""

    def __init__(self, address: str, *, timeout_s: float = 5.0) -> None:
        self._channel = PartChannel(address)
        self._timeout_s = timeout_s

    @property
    def _stub(self) -> Any:
        return ExpertsStub(self._channel.now())  # type: ignore[no-untyped-call]

    async def expert_load(self, deployment: str = "") -> ExpertLoad:
        """See ``ExpertsPort``."""
        return _load_of(await self._call(self._stub.GetExpertLoad, pb.GetExpertLoadRequest(deployment=deployment)))

    async def rebalance(self, wish: RebalanceWish) -> str:
        """See ``ExpertsPort``."""
        worker_id: str = (await self._call(self._stub.Rebalance, _wish(wish))).worker_id
        return worker_id

    async def close(self) -> None:
        """Close the connection; idempotent."""
        await self._channel.close()

    async def _call(self, method: Any, request: Message) -> Any:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise error_from_call(error) from error


def _wish(wish: RebalanceWish) -> pb.RebalanceRequest:
    return pb.RebalanceRequest(deployment=wish.deployment, placement_json=wish.placement_json, num_redundant=wish.num_redundant)


def _load_of(response: pb.GetExpertLoadResponse) -> ExpertLoad:
    return ExpertLoad(
        deployment=response.deployment,
        placement_number=response.placement_number,
        placement_json=response.placement_json,
        rows={layer.layer: tuple(layer.rows) for layer in response.layers},
    )


def _door(method: Callable[[bytes, Mapping[str, str]], Awaitable[Message]]) -> Callable[[bytes, Any], Awaitable[Message]]:
    async def call(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        try:
            return await method(raw, metadata)
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the caller gets a status and not a traceback
            await _abort(context, error)

    return call


def _parse(kind: type[_M], raw: bytes) -> _M:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"the request is not a valid {kind.DESCRIPTOR.full_name}; strings must be UTF-8") from error


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    if not isinstance(error, AntiphonError):
        _log.error("a call failed", exc_info=error)
        error = InternalError(str(error))
    status = status_of(error)
    await context.abort(status.code, status.message, status.trailing_metadata)
