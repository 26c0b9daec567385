"""Asks a part of this deployment whether it is alive (control speed).

The answer comes from the other process' rpc thread, not from its loop: who is busy answers, who is stopped or cut off does not.
Must not know: why somebody asks.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antiphon.core.identity import Identity
from antiphon.rpc.channels import channel_options
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials

_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def answers(address: str, timeout_s: float, *, identity: Identity | None = None) -> bool:
    """Whether the rpc server at ``address`` says anything within ``timeout_s`` seconds, over a connection of its own; blocks."""
    options = [*channel_options(), *TARGET_OPTIONS]
    with grpc.secure_channel(address, channel_credentials(identity), options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code() not in _SILENT
        return True


async def answers_on(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """The same over a channel that is open."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        code: Any = error.code()
        return code not in _SILENT
    return True
