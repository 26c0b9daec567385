"""A grpc server with health and reflection, made of services (control speed).

Must not know: what the services do.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # the stubs miss it
from grpc_reflection.v1alpha import reflection

from antiphon.core.errors import Unavailable
from antiphon.core.identity import Identity
from antiphon.rpc.certificates import DoorCertificate
from antiphon.rpc.channels import DEFAULT_LIMITS, ChannelLimits, server_options
from antiphon.rpc.credentials import server_credentials
from antiphon.rpc.doors.calls import Admit, Calls
from antiphon.rpc.doors.crowd import Crowd, RunningCalls

# A client waits for the others by itself; of many more that wait here gRPC drops some without a word.
_STREAMS_OF_A_CONNECTION = 800
_IDLE_MS = 120_000  # without a call; clients open another for their next one


class Service(Protocol):
    """Something a server can serve."""

    @property
    def name(self) -> str:
        """Full name, e.g. antiphon.rpc.v1.Engine: the key of its health and reflection."""
        ...

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the method handlers."""
        ...


class RpcServer:
    """One listening server; owned by the event loop that constructs it. ``close`` is idempotent.

    Health is SERVING for every service and for the whole server ("") from ``start`` on; ``drain`` turns it.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        host: str,
        port: int = 0,
        reuse_port: bool = False,
        limits: ChannelLimits = DEFAULT_LIMITS,
        max_concurrent_calls: int | None = None,
        public: bool = False,
        identity: Identity | None = None,
        tls: DoorCertificate | None = None,
        admit: Admit | None = None,
    ) -> None:
        """Nothing is bound yet.

        Args:
            services: What it serves.
            host: Address to bind.
            port: 0 = any free one.
            reuse_port: Several processes of the machine share the port.
            limits: Of messages and of silence.
            max_concurrent_calls: None = any number.
            public: For users, who have keys of another kind; otherwise only parts of this deployment get in.
            identity: Whose parts; None = this process'.
            tls: A public server's certificate; None = plain text.
            admit: Refuses keys as soon as they are known; None = services see to that.
        """
        self._tls = tls
        self._admit = admit
        self._public = public
        self._identity = identity
        self._options = server_options(limits, reuse_port=reuse_port)
        if public:
            self._options.append(("grpc.max_concurrent_streams", _STREAMS_OF_A_CONNECTION))
            self._options.append(("grpc.max_connection_idle_ms", _IDLE_MS))
        self._max_concurrent_calls = max_concurrent_calls
        # Made when it starts: gRPC's shutdown of a server that never started leaves an event that nobody takes, and whoever ends
        # gRPC's poller later in this process waits for it.
        self._server: grpc.aio.Server | None = None
        self._crowd: Crowd | None = None
        self._services = tuple(services)
        self._health = health.HealthServicer()
        self._names = [service.name for service in services]
        self._host = host
        self._port = port
        self._closed = False

    @property
    def port(self) -> int:
        """The bound port, once started."""
        return self._port

    @property
    def address(self) -> str:
        """host:port, once started."""
        return _join(self._host, self._port)

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            Unavailable: the address can't be bound.
        """
        running = RunningCalls()
        calls = Calls(running, self._admit, is_public=self._public)
        server = grpc.aio.server(interceptors=[calls], options=self._options, maximum_concurrent_rpcs=self._max_concurrent_calls)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in self._services:
            service.add_to(server)
        reflection.enable_server_reflection([*self._names, HEALTH_SERVICE, reflection.SERVICE_NAME], server)
        try:
            where = _join(self._host, self._port)
            if self._public and self._tls is not None:
                self._port = server.add_secure_port(where, self._tls.server_credentials())
            elif self._public:
                self._port = server.add_insecure_port(where)
            else:
                self._port = server.add_secure_port(where, server_credentials(self._identity))
        except RuntimeError as error:
            raise Unavailable(f"can't listen on {_join(self._host, self._port)}: {error}") from error
        self._server = server
        self._crowd = Crowd(self._port, running)
        await server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Tell whoever asks for the health that no new calls should come."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def close(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, give running ones ``grace_s`` seconds, then cancel them."""
        if self._closed:
            return
        self._closed = True
        if self._crowd is not None:
            self._crowd.close()
        if self._server is not None:
            await self._server.stop(grace_s if grace_s > 0 else None)

    async def __aenter__(self) -> RpcServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ["", *self._names]:
            await self._health.set(name, status)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
