"""Connections to servers that documents name: none to a host that nothing of ours goes to (request speed).

A name may become any address, and another one each time it is looked up, so that the peer of the connection itself is looked at,
before TLS and before a byte is sent. No redirect is followed. Must not know: what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable

import httpcore
import httpx

from antiphon.core.text.addresses import check_host


def open_client() -> httpx.AsyncClient:
    """A client for external endpoints. Where the environment names a proxy, that is what connects."""
    client = httpx.AsyncClient(follow_redirects=False, limits=httpx.Limits(max_connections=None))
    pool: httpcore.AsyncConnectionPool = client._transport._pool  # type: ignore[attr-defined]  # httpx has no other way in
    pool._network_backend = _Checked(pool._network_backend)
    return client


class _Checked(httpcore.AsyncNetworkBackend):
    """Another backend, and who is at the other end."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend) -> None:
        self._inner = inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A stream to that host. Raises httpcore.ConnectError, ConnectTimeout."""
        _check(host)
        stream = await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        peer = stream.get_extra_info("server_addr")
        try:
            _check(str(peer[0]))
        except httpcore.ConnectError:
            await stream.aclose()
            raise
        return stream

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        return await self._inner.connect_unix_socket(path, timeout, socket_options)

    async def sleep(self, seconds: float) -> None:
        """See httpcore."""
        await self._inner.sleep(seconds)


def _check(host: str) -> None:
    """Raises httpcore.ConnectError: nothing of ours goes there."""
    try:
        check_host(host)
    except ValueError as error:
        raise httpcore.ConnectError(str(error)) from None
