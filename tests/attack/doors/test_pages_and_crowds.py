"""What reaches a door through a browser of its user's, and crowds of clients that hold what others need; a running deployment."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from antiphon.gateway.http.protocol import BoundedProtocol
from attack.conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

BODY = {"model": "target", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
EVIL = "http://evil.example"


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def ask(target: Target, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    content = json.dumps(BODY) if method == "POST" else None
    return httpx.request(method, f"{target.http}{path}", content=content, headers=headers, trust_env=False, timeout=30.0)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/trace", "/v1/models", "/status"]
)
def test_a_page_of_another_site_starts_no_work(target: Target, path: str) -> None:
    """A plain POST, which a browser sends without asking first; also of a page that has no origin, as in a frame."""
    port = target.http.rpartition(":")[2]
    method = "GET" if path in ("/v1/models", "/status") else "POST"
    for origin in (EVIL, f"http://evil.example:{port}", "null", f"https://127.0.0.1.evil.example:{port}", "http://127.0.0.1:1"):
        for kind in ("text/plain", "application/json"):
            answer = ask(target, method, path, {"origin": origin, "content-type": kind})
            assert answer.status_code == 403, (origin, kind, answer.text)
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.localhost.example.", "a.b"]
)
def test_a_name_that_was_pointed_here_reads_nothing(target: Target, host: str) -> None:
    """DNS rebinding (CVE-2024-28224): to the browser the page and this door are one site."""
    port = target.http.rpartition(":")[2]
    for method, path in (("GET", "/status"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/"), ("POST", "/v1/completions")):
        for name in (host, f"{host}:{port}", host.upper()):
            answer = ask(
                target, method, path, {"host": name, "origin": f"http://{name.lower()}", "content-type": "application/json"}
            )
            assert answer.status_code == 403, (name, answer.text)
            assert answer.headers["x-request-id"]


def test_this_machines_own_names_and_pages_are_let_in(target: Target) -> None:
    port = target.http.rpartition(":")[2]
    for host in ("localhost", "127.0.0.1", "[::1]", "demo.localhost", "box", "box.local", "10.0.0.8", "LOCALHOST"):
        for more in ({}, {"origin": f"http://{host.lower()}:{port}"}):
            answer = ask(target, "POST", "/v1/completions", {"host": f"{host}:{port}", "content-type": "application/json", **more})
            assert answer.status_code == 200, (host, answer.text)


HELD = {
    "silent": b"",
    "headers begun": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
    "a body begun": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{",
    "kept after an answer": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("held", list(HELD))
def test_a_crowd_that_holds_every_connection_keeps_nobody_out(target: Target, held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No 503 for whoever asks meanwhile."""
    for protocol in BoundedProtocol.__subclasses__():
        monkeypatch.setattr(protocol, "max_connections", 200)  # of the door in this process: files are not to run out here
    host, _, port = target.http.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection((host, int(port)), 20.0)) for _ in range(300)]
        for sock in crowd:
            with contextlib.suppress(OSError):  # its place is another's already
                sock.sendall(HELD[held])
        started = time.monotonic()
        for _ in range(5):
            answer = httpx.post(f"{target.http}/v1/completions", json=BODY, trust_env=False, timeout=30.0)
            assert answer.status_code == 200, answer.text
        assert time.monotonic() - started < 15.0
