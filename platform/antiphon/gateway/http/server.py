"""A uvicorn server inside a running event loop (control speed). Must not know: the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from antiphon.core.errors import Unavailable
from antiphon.gateway.http.protocol import BoundedProtocol, max_connections
from antiphon.rpc.certificates import HANDSHAKE_S, LOOK_S, DoorCertificate

_log = logging.getLogger(__name__)


class _Protocol(BoundedProtocol):
    max_connections = max_connections()


class _Server(uvicorn.Server):
    tls: ssl.SSLContext | None = None
    protocol: type[BoundedProtocol] = _Protocol

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets; uvicorn's own way lets a client take a minute to shake hands."""
        if self.tls is None:
            await super().startup(sockets)
            return
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            return self.protocol(config=self.config, server_state=self.server_state, app_state={}, _loop=loop)

        self.servers = [
            await loop.create_server(
                protocol, sock=each, ssl=self.tls, backlog=self.config.backlog, ssl_handshake_timeout=HANDSHAKE_S
            )
            for each in sockets or []
        ]
        self.started = True

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
        tls: its certificate; None = plain text.
        on_refused: told the code of each refusal that the application does not see, such as headers without end.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        reuse_port: bool = False,
        tls: DoorCertificate | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        own = {} if on_refused is None else {"on_refused": staticmethod(on_refused)}
        protocol = type("_Protocol", (_Protocol,), own)  # of this server alone, as the connections that it holds are
        self._host = host
        self._port = port
        self._reuse_port = reuse_port
        self._config = uvicorn.Config(
            app,
            http=protocol,
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
        self._server.protocol = protocol
        self._tls = tls
        self._task: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port, once started."""
        return self._port

    async def start(self, timeout_s: float = 10.0) -> None:
        """Bind and serve.

        Raises:
            Unavailable: the address can't be bound.
        """
        if self._tls is not None:
            self._server.tls = self._tls.server_context()
            self._renewing = asyncio.create_task(self._renew(self._tls, self._server.tls), name="http certificate")
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
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)

    async def _renew(self, tls: DoorCertificate, context: ssl.SSLContext) -> None:
        given = tls.number
        while True:
            await asyncio.sleep(LOOK_S)
            number = tls.look()
            if number == given:
                continue
            try:
                tls.renew(context)
                given = number
            except (OSError, ValueError) as error:  # changed once more, in this moment: the next look has it
                _log.warning("the HTTP door's certificate stays as it is: %s", error)

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
