"""Names in documents that turn into an address of the node's own network: nothing is sent there, redirects aside or through one.

Loopback has to stand for that network here: 127.0.0.2 is what must not be reached.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.coe.serving.doors.connections import open_client
from antiphon.core.errors import Unavailable
from antiphon.core.text import addresses
from antiphon_operator.fetch import fetch

FORBIDDEN, ALLOWED = "127.0.0.2", "127.0.0.1"
NAMES = {"inside.test": FORBIDDEN, "outside.test": ALLOWED}


class Listener:
    """Answers every connection in one way, and keeps what was sent."""

    def __init__(self, host: str, answer: bytes) -> None:
        self._socket = socket.create_server((host, 0))
        self._answer = answer
        self.heard = b""
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65_536):
                    self.heard += data
                    if b"\r\n\r\n" in data:
                        connection.sendall(self._answer)
                        break

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    resolve = socket.getaddrinfo

    def named(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return resolve(NAMES.get(name, name), *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    monkeypatch.setattr(addresses, "_METADATA", frozenset({ip_address(FORBIDDEN)}))
    monkeypatch.setenv("NO_PROXY", "*")
    listener = Listener(FORBIDDEN, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nSTOLEN")
    yield listener
    listener.close()


@pytest.mark.parametrize("host", ["inside.test", FORBIDDEN])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_external_expert_of_such_a_name_gets_nothing(inside: Listener, scheme: str, host: str) -> None:
    client = open_client()
    with pytest.raises(httpx.ConnectError, match="link-local"):
        await client.post(f"{scheme}://{host}:{inside.port}/v1/chat/completions", json={}, headers={"authorization": "Bearer k"})
    await client.aclose()
    assert inside.heard == b""


async def test_other_names_are_asked_and_their_redirects_not_followed(inside: Listener) -> None:
    away = f"HTTP/1.1 307 No\r\nLocation: http://inside.test:{inside.port}/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    outside = Listener(ALLOWED, away.encode())
    client = open_client()
    answer = await client.post(f"http://outside.test:{outside.port}/v1/chat/completions", json={})
    assert answer.status_code == 307
    await client.aclose()
    outside.close()
    assert b"POST /v1/chat/completions" in outside.heard
    assert inside.heard == b""


def test_a_store_of_such_a_name_gets_nothing(inside: Listener, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="link-local"):
        fetch("s3://bucket/model", tmp_path / "model", endpoint_url=f"http://inside.test:{inside.port}")
    assert inside.heard == b""


def test_a_store_that_sends_there_gets_nothing_from_there(inside: Listener, tmp_path: Path) -> None:
    away = f"HTTP/1.1 302 No\r\nLocation: http://inside.test:{inside.port}/latest\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    outside = Listener(ALLOWED, away.encode())
    with pytest.raises(Unavailable):
        fetch("s3://bucket/model", tmp_path / "model", endpoint_url=f"http://outside.test:{outside.port}")
    outside.close()
    assert outside.heard
    assert inside.heard == b""
