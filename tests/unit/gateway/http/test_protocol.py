"""Connections, headers and bodies end within their limits, and the server goes on."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from antiphon.gateway.http import server as http_server
from antiphon.gateway.http.protocol import MAX_HEADER_BYTES, MAX_HEADERS, BoundedProtocol, max_connections
from antiphon.gateway.http.server import HttpServer
from antiphon.rpc.credentials import knocking_options


class Tight(BoundedProtocol):
    header_timeout_s = 0.3
    body_timeout_s = 0.3
    max_connections = 3
    write_timeout_s = 0.3


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    text = f"{scope['method']} {size}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(text)).encode())]})
    await send({"type": "http.response.body", "body": text})


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, protocol: type[BoundedProtocol] = Tight, app: ASGIApp = application
) -> AsyncIterator[int]:
    monkeypatch.setattr(http_server, "_Protocol", protocol)
    server = HttpServer(app, host="127.0.0.1", port=0)
    async with asyncio.timeout(30):
        await server.start()
        try:
            yield server.port
        finally:
            await server.close()


async def said(port: int, *parts: bytes) -> bytes:
    """Everything the server answers until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


GOOD = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: " + b"a" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: a\r\n" * (MAX_HEADERS + 1) + b"\r\n", b"431"),
        (b"GET /" + b"a" * (MAX_HEADER_BYTES + 1) + b" HTTP/1.1\r\nhost: a\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 4 * MAX_HEADER_BYTES, b"431"),  # without an end
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"505"),
        (b"GET / HT", b"408"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc", b"408"),
        (GOOD, b"200"),
        (b"GET / HTTP/1.0\r\n\r\n", b"200"),
        (b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc", b"200"),
    ],
)
async def test_each_request_ends_within_its_limits(monkeypatch: pytest.MonkeyPatch, sent: bytes, status: bytes) -> None:
    async with serving(monkeypatch) as port:
        answer = await said(port, sent)
        assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
        if status != b"200" and status != b"505":
            assert b'"error": {"message": "' in answer
        assert (await said(port, GOOD)).startswith(b"HTTP/1.1 200")


async def test_who_asks_nothing_is_told_nothing_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as port:
        assert await said(port, b"") == b""


@pytest.mark.parametrize("head", [b"", b"connection: close\r\n"])
@pytest.mark.parametrize(
    "num_bytes", [1 << 23, 1 << 16]
)  # more than is buffered for a client, and little enough to be written at once
async def test_who_reads_nothing_of_an_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch, head: bytes, num_bytes: int) -> None:
    """Whether it is still being written, or waits, closed, for a reader."""

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(num_bytes).encode())]})
        for left in range(num_bytes, 0, -(1 << 16)):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": left > 1 << 16})

    gone = asyncio.Event()
    told: list[str] = []

    class Watched(Tight):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            gone.set()

    monkeypatch.setattr(http_server, "_Protocol", Watched)
    server = HttpServer(answers, host="127.0.0.1", port=0, on_refused=told.append)
    await server.start()
    client = socket.socket()
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
        await asyncio.get_running_loop().sock_sendall(client, b"GET / HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n" + GOOD * (not head))
        async with asyncio.timeout(30):
            await gone.wait()
        assert told == ["client_not_reading"]
    finally:
        client.close()
        await server.close()


async def test_who_reads_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = 1 << 20

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(num_bytes).encode())]})
        await send({"type": "http.response.body", "body": bytes(num_bytes)})

    class Small(Tight):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

    monkeypatch.setattr(http_server, "_Protocol", Small)
    server = HttpServer(answers, host="127.0.0.1", port=0)
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
        writer.write(GOOD)
        await reader.readuntil(b"\r\n\r\n")
        size, pauses = 0, 0
        async with asyncio.timeout(60):
            while chunk := await reader.read(4096):
                size += len(chunk)
                if size // (num_bytes // 8) > pauses:  # longer in all than a client may be still
                    pauses += 1
                    await asyncio.sleep(Small.write_timeout_s / 4)
        assert size == num_bytes
        writer.close()
    finally:
        await server.close()


async def test_a_kept_connection_is_bounded_for_each_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as port:
        request = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok"
        answer = await said(port, request, request, b"GET / HTTP/1.1\r\nhos")
        assert answer.count(b"HTTP/1.1 200") == 2
        assert b"HTTP/1.1 408" in answer


async def test_who_asks_for_another_protocol_is_answered_in_ours_and_fills_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(monkeypatch) as port:
        for protocol in (b"websocket", b"h2c", b"TLS/1.2"):
            named = b"connection: upgrade, close\r\nupgrade: " + protocol
            asked = b"GET / HTTP/1.1\r\nhost: a\r\n" + named + b"\r\nsec-websocket-version: 13\r\n\r\n"
            answer = await said(port, asked)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert b"upgrade:" not in answer.lower()
    assert not caplog.records


class Few(Tight):
    header_timeout_s = body_timeout_s = 20.0


async def test_where_all_connections_are_being_answered_one_more_is_refused_and_room_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered, go = 0, asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal answered
        answered += 1
        await go.wait()
        await application(scope, receive, send)

    async with serving(monkeypatch, Few, slow) as port:
        asked = [asyncio.create_task(said(port, GOOD)) for _ in range(3)]
        while answered < 3:
            await asyncio.sleep(0.01)
        answer = await said(port)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        go.set()
        assert all(each.startswith(b"HTTP/1.1 200") for each in await asyncio.gather(*asked))
        assert (await said(port, GOOD)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"GET / HT",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
    ids=["silent", "headers begun", "body begun", "answered and kept"],
)
async def test_who_holds_all_connections_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch, held: bytes) -> None:
    async with serving(monkeypatch, Few) as port:
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for reader, writer in connections:
            writer.write(held)
            if held.endswith(b"\r\n\r\n"):
                await reader.readuntil(b"GET 0")
        for _ in range(3):
            assert (await said(port, GOOD)).startswith(b"HTTP/1.1 200")
        reader, writer = connections[0]
        rest = await reader.read()  # closed: it was asked for longest
        assert rest.startswith(b"HTTP/1.1 503") or not held or held.endswith(b"\r\n\r\n"), rest
        for _, writer in connections:
            writer.close()


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        pytest.param(b"1\r\na\r\n0\r\n", b"x: " + b"a" * 1000 + b"\r\n", id="trailers"),
        pytest.param(b"1\r\na\r\n0\r\nx: ", b"a" * 1000, id="a trailer"),
        pytest.param(b"1\r\na\r\n1;x=", b"a" * 1000, id="a chunk's extension"),
    ],
)
async def test_what_is_endless_behind_a_body_or_between_its_parts_is_cut(
    monkeypatch: pytest.MonkeyPatch, begun: bytes, more: bytes
) -> None:
    class Patient(Tight):
        body_timeout_s = 20.0

    async with serving(monkeypatch, Patient) as port:
        head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = await said(port, head + begun, *[more] * 200)
        assert b"HTTP/1.1 200" not in answer
        assert (await said(port, GOOD)).startswith(b"HTTP/1.1 200")


def test_the_limit_of_connections_follows_that_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    assert max_connections() == 120
    assert dict(knocking_options())["grpc.max_allowed_incoming_connections"] == 40
