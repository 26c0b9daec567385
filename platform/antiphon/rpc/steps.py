"""The Steps service: a worker's end over a port, and the gateway that asks (control speed). Must not know: what an event means."""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from antiphon.core.errors import AntiphonError, InternalError, InvalidInput
from antiphon.rpc.channels import PartChannel
from antiphon.rpc.errors import error_from_call, status_of
from antiphon.rpc.v1 import steps_pb2 as pb
from antiphon.rpc.v1.steps_pb2_grpc import StepsStub, add_StepsServicer_to_server
from antiphon.telemetry.step_trace import Event, Mark, WorkerTrace

_log = logging.getLogger(__name__)

MIN_TRACE_S = 0.05
MAX_TRACE_S = 4.0
_MARGIN_S = 5.0  # for a busy worker's answer


class StepsPort(Protocol):
    """Who records."""

    async def trace_steps(self, seconds: float) -> WorkerTrace:
        """What the worker does from now on for so long. Raises an error of the tree."""
        ...


class StepsServicer:
    """Serves antiphon.rpc.v1.Steps."""

    name = "antiphon.rpc.v1.Steps"

    def __init__(self, port: StepsPort) -> None:
        self._port = port

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_StepsServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def TraceSteps(  # noqa: N802 - the method's name in the proto
        self, request: pb.TraceStepsRequest, context: grpc.aio.ServicerContext[pb.TraceStepsRequest, pb.TraceStepsResponse]
    ) -> pb.TraceStepsResponse:
        """See the proto."""
        try:
            if not MIN_TRACE_S <= request.seconds <= MAX_TRACE_S:
                raise InvalidInput(f"expected {MIN_TRACE_S:g} to {MAX_TRACE_S:g}", "seconds")
            return _message(await self._port.trace_steps(request.seconds))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the caller gets a status and not a traceback
            known = error if isinstance(error, AntiphonError) else InternalError(str(error))
            if known is not error:
                _log.error("a trace failed", exc_info=error)
            status = status_of(known)
            await context.abort(status.code, status.message, status.trailing_metadata)


class StepsCalls:
    """Calls to one worker of this deployment; belongs to one event loop."""

    def __init__(self, address: str) -> None:
        self._channel = PartChannel(address)

    async def trace_steps(self, seconds: float) -> WorkerTrace:
        """See ``StepsPort``. Raises Unavailable while nobody answers, InvalidInput for an answer that is no trace."""
        try:
            stub: Any = StepsStub(self._channel.now())  # type: ignore[no-untyped-call]
            response = await stub.TraceSteps(pb.TraceStepsRequest(seconds=seconds), timeout=seconds + _MARGIN_S)
        except (grpc.RpcError, DecodeError) as error:
            if isinstance(error, grpc.RpcError):
                raise error_from_call(error) from error
            raise InvalidInput(f"not a trace: {error}") from error
        return _trace(response)

    async def close(self) -> None:
        """Close the connection; idempotent."""
        await self._channel.close()


def _message(trace: WorkerTrace) -> pb.TraceStepsResponse:
    return pb.TraceStepsResponse(
        worker=trace.worker,
        role=trace.role,
        pid=trace.pid,
        events=[
            pb.StepEvent(
                mark=event.mark.value,
                start_s=event.start_s,
                end_s=event.end_s,
                step=event.step,
                layer=event.layer,
                ubatch=event.ubatch,
                rows=event.rows,
                peer=event.peer,
            )
            for event in trace.events
        ],
    )


def _trace(response: pb.TraceStepsResponse) -> WorkerTrace:
    marks = {mark.value: mark for mark in Mark}
    if any(e.mark not in marks or not math.isfinite(e.start_s) or not math.isfinite(e.end_s) for e in response.events):
        raise InvalidInput(f"{response.worker} sent a trace that is none")
    return WorkerTrace(
        worker=response.worker,
        role=response.role,
        pid=response.pid,
        events=tuple(
            Event(
                mark=marks[e.mark],
                start_s=e.start_s,
                end_s=e.end_s,
                step=e.step,
                layer=e.layer,
                ubatch=e.ubatch,
                rows=e.rows,
                peer=e.peer,
            )
            for e in response.events
        ),
    )
