"""The HTTP server's sockets."""

import asyncio
import socket
from typing import Any

import httpx

from antiphon.gateway.http.server import HttpServer


async def test_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    seen: list[int] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        transport = send.__self__.transport
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server = HttpServer(app, host="127.0.0.1", port=0)
    async with asyncio.timeout(10):
        await server.start()
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{server.port}/")
        await server.close()
    assert answer.status_code == 204
    assert seen == [1]
