"""Options of channels and servers: message sizes, keepalive, reconnection (request speed).

Every connection of the platform is opened here, so that limits and keepalive are the same at both ends.
Must not know: which services travel on a channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from antiphon.core.errors import Unavailable
from antiphon.core.identity import Identity, own_identity
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials, knocking_options

ChannelOptions = list[tuple[str, int | str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelLimits:
    """What both ends of a connection allow."""

    max_message_bytes: int = 64 * 2**20
    keepalive_s: float = 10.0  # silence before a ping
    keepalive_timeout_s: float = 5.0  # silence after a ping before the connection is given up
    connect_attempt_s: float = 5.0  # how long one attempt to connect may take
    max_backoff_s: float = 2.0  # longest pause between attempts to connect


DEFAULT_LIMITS = ChannelLimits()


def channel_options(limits: ChannelLimits = DEFAULT_LIMITS) -> ChannelOptions:
    """The client end's options."""
    return [
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # By its name a pause, by its effect the time one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", int(limits.connect_attempt_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(limits.max_backoff_s * 1000)),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # channels to one address fail and recover apart from each other
    ]


def server_options(limits: ChannelLimits = DEFAULT_LIMITS, *, reuse_port: bool = False) -> ChannelOptions:
    """The server end's options; ``reuse_port`` lets several processes of one machine share a port."""
    return [
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
        # Clients may ping as often as channel_options make them, with room for jitter.
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.keepalive_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", int(reuse_port)),
        *knocking_options(),
    ]


def open_part_channel(
    address: str, limits: ChannelLimits = DEFAULT_LIMITS, *, identity: Identity | None = None
) -> grpc.aio.Channel:
    """An asyncio channel to another part of this deployment, proven at both ends; connects lazily and again after a loss."""
    options = [*channel_options(limits), *TARGET_OPTIONS]
    return grpc.aio.secure_channel(address, channel_credentials(identity), options=options)


class PartChannel:
    """The channel to another part, made anew when the deployment's keys have changed. Belongs to one event loop.

    Args:
        address: host:port.
        options: of gRPC; None = ``channel_options()``.
        identity: keys that don't change; None = this process'.
        grace_s: calls on a channel that is replaced may go on for so long.
    """

    def __init__(
        self,
        address: str,
        *,
        options: Sequence[tuple[str, Any]] | None = None,
        identity: Identity | None = None,
        grace_s: float = 60.0,
    ) -> None:
        self._address = address
        self._options = [*(channel_options() if options is None else options), *TARGET_OPTIONS]
        self._fixed = identity
        self._grace_s = grace_s
        self._identity: Identity | None = None
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def now(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        identity = own_identity() if self._fixed is None else self._fixed
        if self._channel is None or identity is not self._identity:
            old, self._identity = self._channel, identity
            self._channel = grpc.aio.secure_channel(self._address, channel_credentials(identity), options=self._options)
            if old is not None:
                task = asyncio.ensure_future(old.close(self._grace_s))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self) -> None:
        """End it, and the calls on it. Idempotent."""
        for task in self._closing:
            task.cancel()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)


def open_channel(address: str, limits: ChannelLimits = DEFAULT_LIMITS) -> grpc.aio.Channel:
    """An asyncio channel to ``host:port``; connects lazily and again after a loss."""
    return grpc.aio.insecure_channel(address, options=channel_options(limits))


async def wait_until_connected(channel: grpc.aio.Channel, address: str, timeout_s: float) -> None:
    """Return once the channel is connected.

    Raises:
        Unavailable: it isn't within ``timeout_s`` seconds.
    """
    try:
        async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may swallow its task's cancellation
            await channel.channel_ready()
    except TimeoutError as error:
        raise Unavailable(f"no connection to {address} within {timeout_s:g} s") from error
