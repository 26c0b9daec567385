"""What no HTTP library sends, at the door of a running deployment: each ends with its own refusal, and nothing is smuggled."""

from __future__ import annotations

import gzip
import random
import socket
import time
from collections.abc import Iterator

import psutil
import pytest

from .conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

BODY = b'{"model":"target","prompt":[5,6],"max_tokens":1}'
CHUNKED = hex(len(BODY))[2:].encode() + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
HIDDEN = b"GET /status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
KiB, MiB = 2**10, 2**20
WAIT_S = 20.0


def post(more: bytes = b"", body: bytes = BODY, length: bytes | None = None, path: bytes = b"/v1/completions") -> bytes:
    size = str(len(body)).encode() if length is None else length
    lines = b"content-length: " + size + b"\r\n" if size else b""
    return b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + more + lines + b"\r\n" + body


def get(path: bytes, more: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n" + more + b"connection: close\r\n\r\n"


CLOSE = b"connection: close\r\n"
TE = b"transfer-encoding: chunked\r\n"
REFUSED = b"400 404 405 408 411 413 414 415 431 501 505"
# What is sent -> statuses that are an answer to it.
CASES: dict[str, tuple[bytes, bytes]] = {
    "a good one": (post(CLOSE), b"200"),
    "length and chunks": (post(TE + CLOSE, CHUNKED, b"4"), REFUSED),
    "a request behind length and chunks": (post(TE, b"0\r\n\r\n" + HIDDEN, b"6"), REFUSED),
    "a request behind a short length": (post(TE, CHUNKED[:-2] + b"x: " + HIDDEN, b"4"), REFUSED),
    "two lengths": (post(b"content-length: 5\r\n" + CLOSE), REFUSED),
    "a list of lengths": (post(CLOSE, length=b"48, 48"), REFUSED),
    "a signed length": (post(CLOSE, length=b"+48"), REFUSED),
    "a negative length": (post(length=b"-1"), REFUSED),
    "a length of 5000 digits": (post(length=b"9" * 5000), REFUSED),
    "a length of 10^30": (post(length=b"1" + b"0" * 30), REFUSED),
    "an unknown coding": (post(b"transfer-encoding: xchunked\r\n" + CLOSE, length=b""), REFUSED),
    "chunks, then identity": (post(b"transfer-encoding: chunked, identity\r\n" + CLOSE, CHUNKED, b""), REFUSED),
    "a space before the colon": (post(b"transfer-encoding : chunked\r\n" + CLOSE, CHUNKED, b""), REFUSED),
    "a chunk of 2^64-1": (post(TE, b"ffffffffffffffff\r\nabc", b""), REFUSED),
    "a chunk of -1": (post(TE, b"-1\r\nabc", b""), REFUSED),
    "a chunk with a wrong end": (post(TE, b"3\r\nabcX\r\n0\r\n\r\n", b""), REFUSED),
    "a trailer that is a header": (post(TE + CLOSE, CHUNKED[:-2] + b"authorization: Bearer x\r\n\r\n", b""), b"200 " + REFUSED),
    "a chunk's extension of 1 MiB": (post(TE + CLOSE, b"30;" + b"a" * MiB + b"\r\n" + BODY + b"\r\n0\r\n\r\n", b""), REFUSED),
    "a trailer of 8 MiB": (post(TE + CLOSE, CHUNKED[:-2] + b"x: " + b"a" * 8 * MiB, b""), b"200 " + REFUSED),
    "10,000 headers": (get(b"/health", b"x: a\r\n" * 10_000), b"431"),
    "a header of 1 MiB": (get(b"/health", b"x: " + b"a" * MiB + b"\r\n"), b"431"),
    "a path of 1 MiB": (get(b"/" + b"a" * MiB), b"431"),
    "a header that goes on in the next line": (post(b"x: 1\r\n 2\r\n" + CLOSE), REFUSED),
    "lines without a carriage return": (post(CLOSE).replace(b"\r\n", b"\n"), b"200 " + REFUSED),
    "NUL in a header": (post(b"x: a\0b\r\n" + CLOSE), REFUSED),
    "a carriage return in a header": (post(b"x: a\rb: c\r\n" + CLOSE), REFUSED),
    "h2c": (post(b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"), b"200 " + REFUSED),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REFUSED),
    "a websocket": (
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: a\r\n\r\n",
        b"200 " + REFUSED,
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 512, REFUSED),
    "CONNECT": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", REFUSED),
    "TRACE": (b"TRACE / HTTP/1.1\r\nhost: x\r\ncookie: s\r\nconnection: close\r\n\r\n", REFUSED),
    "ranges": (get(b"/web/page.js", b"range: bytes=" + b"0-1," * 5000 + b"0-1\r\n"), b"200 206 416 " + REFUSED),
    "a packed body": (post(b"content-encoding: gzip\r\n" + CLOSE, gzip.compress(bytes(8 * MiB))), REFUSED),
    "another server's address": (post(CLOSE, path=b"http://127.0.0.1:1/v1/completions"), b"200 " + REFUSED),
    **{
        f"the path {path.decode()}": (get(path), b"404 400 405")
        for path in (
            b"/web/../../../etc/passwd",
            b"/web/..%2f..%2f..%2fetc%2fpasswd",
            b"/web/..%252f..%252fetc%252fpasswd",
            b"/web/%00",
            b"/web/..%5c..%5cetc%5cpasswd",
            b"/v1/models/..%2f..%2fetc%2fpasswd",
            b"/v1/responses/..%2fresp_x",
            b"/v1/models/%ff%fe%0d%0ax:y",
        )
    },
}

DROPPED = {"a chunk of 2^64-1", "a trailer of 8 MiB"}  # waits for the rest; is reset while it still sends: perhaps without a word


def said(target: Target, sent: bytes, *, ends: bool = False, silent_s: float = 1.0) -> bytes:
    """Everything that is answered until it closes, or is silent after its first word. ``ends``: no more will be sent."""
    host, _, port = target.http.removeprefix("http://").partition(":")
    got = b""
    with socket.create_connection((host, int(port)), WAIT_S) as sock:
        try:
            sock.sendall(sent)
            if ends:
                sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1 << 16):
                got += part
                sock.settimeout(silent_s)
        except OSError:  # what came after was not read: closed, and reset
            return got
    return got


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def test_each_gets_its_own_refusal_and_nothing_behind_it_is_answered(target: Target) -> None:
    wrong = {}
    for name, (sent, allowed) in CASES.items():
        got = said(target, sent, ends=name in DROPPED)
        statuses = [line.split(b" ")[1] for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
        known = allowed.split()
        if (
            len(statuses) > 1
            or (not statuses and name not in DROPPED)
            or any(status not in known for status in statuses)
            or b"worker_id" in got
            or b"root:" in got
        ):
            wrong[name] = got[:300]
    assert not wrong
    assert said(target, post(CLOSE)).startswith(b"HTTP/1.1 200")


def test_many_requests_at_once_on_one_connection_are_answered_in_order(target: Target) -> None:
    got = said(target, b"".join([post()] * 40) + get(b"/health"), silent_s=WAIT_S)
    assert got.count(b"HTTP/1.1 200") == 41


def test_bytes_that_are_no_requests_leave_nothing_behind(target: Target) -> None:
    """In the process of the gateway, which is this one."""
    chance, process = random.Random(5), psutil.Process()
    good = [sent for sent, _ in CASES.values() if len(sent) < 4 * KiB]
    before = process.num_fds()
    for _ in range(300):
        data = bytearray(chance.choice(good))
        for _ in range(chance.choice([1, 2, 8])):
            at = chance.randrange(len(data))
            data[at : at + chance.choice([0, 1, 4])] = chance.randbytes(chance.choice([0, 1, 4]))
        got = said(target, bytes(data), ends=True)
        assert not got.startswith(b"HTTP/1.1 5") or got[9:12] in (b"501", b"505", b"503", b"504"), (bytes(data)[:300], got[:300])
    end = time.monotonic() + 30.0
    while process.num_fds() > before + 4:
        assert time.monotonic() < end, "connections are left open"
        time.sleep(0.1)
