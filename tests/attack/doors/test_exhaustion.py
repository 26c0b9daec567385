"""What a client can make a running gateway spend: bodies, headers and templates that cost far more than they should."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import GatewayThread, serving_config
from attack.conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

MiB = 2**20
M = 4 * MiB - 400
HEALTH_S = 5.0  # others' turn on a machine that does much else; one body held it for 12 s
MORE_BYTES = 700 * MiB  # of all that are sent at once; one took 4 GB


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


class Watch:
    """Somebody else meanwhile: how long the door took for him at worst, and the most memory of the gateway: this process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.worst_s = 0.0
        self.most_bytes = 0

    def _look(self) -> None:
        process = psutil.Process()
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60.0) as client:
            while not self._ends.is_set():
                started_s = time.monotonic()
                assert client.get("/health").status_code == 200
                self.worst_s = max(self.worst_s, time.monotonic() - started_s)
                self.most_bytes = max(self.most_bytes, process.memory_info().rss)
                self._ends.wait(0.05)

    def __enter__(self) -> Watch:
        self.before_bytes = psutil.Process().memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def check(self, more_bytes: int = MORE_BYTES) -> None:
        assert self.worst_s < HEALTH_S
        assert self.most_bytes - self.before_bytes < more_bytes


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = '"messages":[{"role":"user","content":"x"}]'
DEAR: dict[str, tuple[str, str]] = {
    "objects": (COMPLETIONS, '"prompt":[' + "{}," * (M // 3) + "{}]"),
    "lists of one id": (COMPLETIONS, '"prompt":[' + "[1]," * (M // 4) + "[1]]"),
    "texts and ids": (COMPLETIONS, '"prompt":[' + '"a",1,' * (M // 6) + "1]"),
    "empty texts": (COMPLETIONS, '"prompt":[' + '"",' * (M // 3) + '""]'),
    "one text": (COMPLETIONS, '"prompt":"' + "a b " * (M // 4) + '"'),
    "fields": (COMPLETIONS, '"prompt":"x",' + ",".join(f'"k{number}":1' for number in range(300_000))),
    "messages": (CHAT, '"messages":[' + '{"x":1},' * (M // 8) + "{}]"),
    "parts": (CHAT, '"messages":[{"role":"user","content":[' + "{}," * (M // 3) + "{}]}]"),
    "depth": (CHAT, SAID + ',"metadata":{"a":' + "[" * (M // 2) + "}"),
    "biases": (CHAT, SAID + ',"logit_bias":{' + ",".join(f'"{number}":"a"' for number in range(250_000)) + "}"),
}


@pytest.mark.parametrize("name", list(DEAR))
def test_dear_bodies_hold_nobody_up_and_fill_no_memory(target: Target, name: str) -> None:
    """Four at once of 4 MiB each."""
    path, fields = DEAR[name]
    body = ('{"model":"target","max_tokens":1,' + fields + "}").encode()[: 4 * MiB]
    statuses: list[int] = []

    def send() -> None:
        headers = {"content-type": "application/json"}
        statuses.append(
            httpx.post(f"{target.http}{path}", content=body, headers=headers, trust_env=False, timeout=60.0).status_code
        )

    with Watch(target.http) as watch:
        senders = [threading.Thread(target=send) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    assert len(statuses) == 4
    assert set(statuses) <= {400, 413, 429}
    watch.check()


def test_headers_without_end_are_ended(target: Target) -> None:
    """Sixteen connections of 16 MiB of headers each: one line of that length, or lines of 1 KiB."""
    host, _, port = target.http.removeprefix("http://").partition(":")
    ended = 0
    with Watch(target.http) as watch:
        for number in range(16):
            line = b"x: " + b"a" * 1020 + b"\r\n"
            part = (b"a" * 1024 if number % 2 else line) * 64
            with socket.create_connection((host, int(port)), 20.0) as sock, contextlib.suppress(OSError):
                sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + (b"x: " if number % 2 else b""))
                for _ in range(256):
                    sock.sendall(part)
                ended -= 1
            ended += 1
    assert ended == 16, "a connection took them all"
    watch.check(64 * MiB)


def test_a_request_that_stays_unfinished_is_ended(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are the gateway's own; only how often it looks at them is another here."""
    from antiphon.gateway.http.protocol import BoundedProtocol

    for protocol in BoundedProtocol.__subclasses__():
        monkeypatch.setattr(protocol, "header_timeout_s", 1.0)
        monkeypatch.setattr(protocol, "body_timeout_s", 1.0)
    host, _, port = target.http.removeprefix("http://").partition(":")
    begun = (
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    )
    for sent in begun:
        with socket.create_connection((host, int(port)), 30.0) as sock:
            for at in range(len(sent)):
                sock.sendall(sent[at : at + 1])
            answer = b""
            while more := sock.recv(1 << 12):
                answer += more
            assert answer.startswith(b"HTTP/1.1 408"), answer[:100]


# Rendered for a certain message only, and nothing of it is a constant: the check at the start can't see it.
LOOPS = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (10 ** (10 ** (8 * one))) | string | length }}",
    "a long text": "{{ m.content * 400000000 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "text after text": "{% for i in range(99999) %}{{ 'a' * one * 9999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def looping(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway of the deployment whose model's chat template has all of these."""
    base = tmp_path_factory.mktemp("looping") / "model"
    shutil.copytree(target.checkpoint, base)
    branches = "".join(f"{{% elif m.content == 'loop {number}' %}}{source}" for number, source in enumerate(LOOPS.values()))
    template = (
        "{% for m in messages %}{% set one = m.role and 1 %}{% if m.content == 'nothing' %}"
        + branches
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    config: dict[str, Any] = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    gateway = GatewayThread(
        serving_config(Serving.alone(target.document, str(base)), drain_s=1.0), target.deployment.directory_address
    )
    try:
        url = f"http://127.0.0.1:{gateway.wait_open(60.0).http_port}"
        while httpx.get(f"{url}/ready", trust_env=False, timeout=30.0).status_code != 200:
            gateway.check()
        yield url
    finally:
        gateway.close()


def test_templates_that_never_end_hold_nobody_up(looping: str) -> None:
    """Each asked for while another user's chats are answered by the same template."""

    def ask(content: str) -> httpx.Response:
        body = {"model": "target", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return httpx.post(f"{looping}{CHAT}", json=body, trust_env=False, timeout=60.0)

    with Watch(looping) as watch:
        statuses = {}
        for number, name in enumerate(LOOPS):
            statuses[name] = ask(f"loop {number}").status_code
            assert ask("hello").status_code == 200
    assert set(statuses.values()) <= {200, 400}, statuses  # some come to an end, with a text that is too long or is not
    assert sum(status == 400 for status in statuses.values()) >= 5, statuses
    watch.check()
