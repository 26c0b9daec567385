"""A uvicorn server inside a running event loop (control speed). Must not know: the application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from antiphon.core.errors import Unavailable
from antiphon.gateway.http.protocol import BoundedProtocol, max_connections


class _Protocol(BoundedProtocol):
    max_connections = max_connections()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, not to this server."""
        yield


class HttpServer:
    """One listening server; owned by the event loop that starts it. ``close`` is idempotent.

    Args:
        app: what is served.
        host: address to bind.
        port: 0 = any free one.
        reuse_port: several processes share the port.
    """

    def __init__(self, app: ASGIApp, *, host: str, port: int, reuse_port: bool = False) -> None:
        self._host = host
        self._port = port
        self._reuse_port = reuse_port
        self._config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=2048,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(self._config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port, once started."""
        return self._port

    async def start(self, timeout_s: float = 10.0) -> None:
        """Bind and serve.

        Raises:
            Unavailable: the address can't be bound.
        """
        listening = self._bind()
        self._port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]), name="http server")
        async with asyncio.timeout(timeout_s):
            while not self._server.started and not self._task.done():  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)
        if self._task.done():
            await self._task  # raises

    async def failed(self) -> None:
        """Return when the server has ended by itself; raises what ended it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop listening and end what is left."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # With the protocol named, asyncio turns Nagle's algorithm off: answers else wait 40 ms for the client's acknowledgement.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            raise Unavailable(f"can't listen on {self._host}:{self._port}: {error}") from error
        listening.setblocking(False)
        return listening
