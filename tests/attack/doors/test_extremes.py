"""Fields at their ends, names that are paths, lines or patterns, addresses to fetch, crowds at every port; a running deployment."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from antiphon.core.ids import Role
from antiphon.gateway.config import BoundPorts
from antiphon.telemetry.logs import TextFormatter
from attack.conftest import Target, second_gateway

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
KEYS = {"red": "red-key-of-random-text", "blue": "blue-key-of-random-text"}
BODY: dict[str, Any] = {"model": "target", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
SAID: dict[str, Any] = {"model": "target", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
MiB = 2**20


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


@pytest.fixture
def http(target: Target) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=target.http, trust_env=False, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def keyed(target: Target) -> Iterator[BoundPorts]:
    with second_gateway(target, api_keys=frozenset(KEYS.values())) as bound:
        yield bound


EXTREMES: list[dict[str, Any]] = [
    {"n": 10**9},
    {"n": 2**63},
    {"best_of": 10**9},
    {"n": 128, "prompt": [[5, 6]] * 128},
    {"n": -(2**70)},
    {"logit_bias": {str(each): 1.0 for each in range(200_000)}},
    {"logit_bias": {"9" * 5_000: 1.0}},
    {"logit_bias": {"5": 1e300}},
    {"stop": ["x" * 3 * MiB]},
    {"stop": [f"{each}" for each in range(100_000)]},
    {"stop_token_ids": list(range(300_000))},
    {"stop_token_ids": [2**64]},
    {"bad_words": ["a" * 100] * 20_000},
    {"max_tokens": 10**30},
    {"min_tokens": 10**9},
    {"logprobs": 10**9},
    {"prompt_logprobs": 10**9},
    {"seed": 10**40},
    {"priority": 10**40},
    {"top_k": 10**40},
    {"repetition_penalty": 1e-300},
    {"cache_salt": "s" * 2 * MiB},
    {"user": "u" * 2 * MiB},
    {"suffix": "s" * 2 * MiB},
    {"model": "m" * 2 * MiB},
    {"prompt": []},
    {"prompt": [[]] * 90_000},
    {"stream_options": {"include_usage": True, "x": "y" * MiB}, "stream": True},
]


def test_no_field_at_its_end_costs_more_than_a_refusal(target: Target, http: httpx.Client) -> None:
    """vLLM's n without a bound (CVE-2026-34756), llama.cpp's negative numbers (CVE-2026-21869), and all of their kind."""
    process = psutil.Process()
    resident = process.memory_info().rss
    for extreme in EXTREMES:
        before_s = sum(process.cpu_times()[:2])
        answer = http.post(COMPLETIONS, json={**BODY, **extreme})
        name = next(iter(extreme))
        assert answer.status_code in (200, 400, 404, 413, 429), (name, answer.text[:200])
        if answer.status_code != 200:
            assert len(answer.content) < 4_096, name  # what was sent is not sent back
        assert sum(process.cpu_times()[:2]) - before_s < 5.0, name
    assert process.memory_info().rss - resident < 256 * MiB


def test_letters_that_grow_when_they_are_made_equal_are_refused_or_answered_soon(http: httpx.Client) -> None:
    """Normal forms and marks: U+FDFA is 18 letters in one of them; one letter may bear thousands of marks."""
    process = psutil.Process()
    for text in (
        "\ufdfa" * 60_000,
        "a" + "\u0301" * 100_000,
        "\U0001f468\u200d" * 40_000,
        "\u202e\ufeff\u0000" * 30_000,
        "\u1e9b\u0323" * 60_000,
    ):
        before_s = sum(process.cpu_times()[:2])
        for path, body in (
            (COMPLETIONS, {**BODY, "prompt": text}),
            (CHAT, {**SAID, "messages": [{"role": "user", "content": text, "name": text[:60]}]}),
            ("/tokenize", {"model": "target", "prompt": text}),
            (CHAT, {**SAID, "tools": [{"type": "function", "function": {"name": text[:64], "parameters": {}}}]}),
            (CHAT, {**SAID, "model": text}),
        ):
            answer = http.post(path, json=body)
            assert answer.status_code in (200, 400, 404, 413), (path, answer.text[:200])
        assert sum(process.cpu_times()[:2]) - before_s < 10.0


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, list[Any]]]:
    """An address, and who came there."""
    came: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        ended = threading.Event()

        def take() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    peer, _ = server.accept()
                    came.append(peer.recv(1024))
                    peer.close()

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", came
        finally:
            ended.set()
            thread.join()


def test_no_address_in_a_request_is_fetched(http: httpx.Client) -> None:
    """Images, files, tools elsewhere, schemas by reference: vLLM CVE-2026-24779, TGI CVE-2026-0599 and their kind."""
    with listening() as (address, came):
        url = f"http://{address}/x"
        part: Any
        bodies: list[tuple[str, dict[str, Any]]] = []
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": {"url": f"file:///etc/passwd#{url}"}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_id": url, "file_data": url}},
        ):
            bodies.append((CHAT, {**SAID, "messages": [{"role": "user", "content": [part]}]}))
        for part in (
            {"type": "input_image", "image_url": url},
            {"type": "input_file", "file_url": url},
            {"type": "input_text", "text": f"![x]({url}) <img src={url}>"},  # TGI's
        ):
            bodies.append((RESPONSES, {"model": "target", "max_output_tokens": 2, "input": [{"role": "user", "content": [part]}]}))
        for part in (
            {"type": "image", "source": {"type": "url", "url": url}},
            {"type": "document", "source": {"type": "url", "url": url}},
        ):
            bodies.append((MESSAGES, {"model": "target", "max_tokens": 2, "messages": [{"role": "user", "content": [part]}]}))
        for tool in (
            {"type": "mcp", "server_label": "x", "server_url": url, "require_approval": "never"},
            {"type": "web_search", "filters": {"allowed_domains": [address]}},
            {"type": "code_interpreter", "container": {"type": "auto", "file_ids": [url]}},
        ):
            bodies.append((RESPONSES, {"model": "target", "max_output_tokens": 2, "input": "x", "tools": [tool]}))
        for schema in ({"$ref": url}, {"type": "object", "properties": {"a": {"$ref": f"{url}#/a"}}}, {"$schema": url, "$id": url}):
            shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
            bodies.append((CHAT, {**SAID, "response_format": shape}))
        bodies.append((COMPLETIONS, {**BODY, "model": url}))
        bodies.append(
            (COMPLETIONS, {**BODY, "kv_transfer_params": {"remote_host": address, "remote_port": 1}, "lora_request": url})
        )
        bodies.append((COMPLETIONS, {**BODY, "webhook_url": url, "callback": url, "api_base": url, "base_url": url}))
        for path, body in bodies:
            answer = http.post(path, json=body, headers={"x-forwarded-host": address, "forwarded": f"host={address}"})
            assert answer.status_code in (200, 400, 404, 429), (path, body, answer.text[:200])
        assert not came


def test_names_that_are_paths_open_no_file(target: Target, http: httpx.Client) -> None:
    names = ["../../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "....//etc/passwd", "file:///etc/passwd", "C:\\x"]
    names += [str(target.checkpoint), f"{target.checkpoint}/config.json", "target\x00/x"]
    for name in [*names, "target/../target", "./target", "target/"]:
        for path, body in (
            (COMPLETIONS, BODY),
            (CHAT, SAID),
            (MESSAGES, SAID),
            (RESPONSES, {"input": "x"}),
            ("/tokenize", {"prompt": "x"}),
        ):
            answer = http.post(path, json={**body, "model": name})
            assert answer.status_code in (400, 404), (path, name, answer.text[:200])
            assert "root:" not in answer.text
    for name in names:
        for head in ("/v1/models/", "/web/", "/v1/responses/", "/"):
            with contextlib.suppress(httpx.InvalidURL):
                answer = http.get(head + name)
                assert answer.status_code in (400, 404), (head, name, answer.text[:200])
                assert "root:" not in answer.text


def test_what_strangers_make_up_is_no_label_of_a_metric(http: httpx.Client) -> None:
    def num_series() -> int:
        return sum(not line.startswith("#") for line in http.get("/metrics").text.splitlines())

    chance = random.Random(5)

    def odd() -> None:
        word = f"w{chance.randrange(10**9)}"
        http.post(COMPLETIONS, json={**BODY, "model": word})
        http.post(CHAT, json={**SAID, "model": f"coe/{word}"})
        http.request(word.upper(), f"/{word}", headers={"authorization": f"Bearer {word}", "user-agent": word, "x-tenant": word})
        http.get(f"/v1/models/{word}", headers={"x-request-id": word, "traceparent": f"00-{word}", "baggage": f"{word}={word}"})
        http.post(COMPLETIONS, json={**BODY, word: 1, "priority": chance.randrange(9), "user": word, "metadata": {word: word}})

    odd()
    before = num_series()
    for _ in range(40):
        odd()
    assert num_series() < before + 40  # of 200 words; buckets that were empty before may be there


def test_no_line_of_a_log_is_a_clients(http: httpx.Client) -> None:
    """Whoever reads a log line by line must not be told by a client what happened."""
    forged = "2026-01-01T00:00:00Z ERROR forged-by-a-client"
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(TextFormatter({}))
    root = logging.getLogger()
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.DEBUG)
    try:
        for end in ("\n", "\r", "\r\n", "\u2028", "\u0085", "\x1b[2J", "\x0b"):
            text = f"x{end}{forged}"
            http.post(COMPLETIONS, json={**BODY, "model": text})
            http.post(COMPLETIONS, json={**BODY, text: 1})
            http.post(COMPLETIONS, json={**BODY, "stop": 5, "user": text, "cache_salt": text})
            http.post(CHAT, json={**SAID, "messages": [{"role": text, "content": text}]})
            http.post(CHAT, json={**SAID, "tools": [{"type": text, "function": {"name": text}}]})
            http.post(RESPONSES, json={"model": "target", "input": "x", "previous_response_id": text})
            http.get("/v1/models/" + "".join(f"%{byte:02x}" for byte in text.encode()))
            with contextlib.suppress(ValueError, httpx.LocalProtocolError):
                http.get("/health", headers={"x-request-id": text, "user-agent": text, "traceparent": text})
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    lines = written.getvalue().splitlines()
    assert lines
    assert not [line for line in lines if line.startswith(forged)]
    assert "\x1b" not in written.getvalue()


def test_clients_that_leave_at_any_moment_leave_nothing_behind(target: Target, http: httpx.Client) -> None:
    def free() -> int:
        workers = http.get("/status").json()["workers"]
        return sum(worker["load"]["num_free_blocks"] for worker in workers if worker["role"] != Role.FFN.value)

    def busy() -> int:
        workers = http.get("/status").json()["workers"]
        return sum(worker["load"]["num_running"] + worker["load"]["num_waiting"] + worker["num_requests"] for worker in workers)

    def settled() -> int:
        end_s = time.monotonic() + 60.0
        while busy():
            assert time.monotonic() < end_s, "requests of clients that left go on"
            time.sleep(0.1)
        time.sleep(1.5)  # until a load is told that was read after that
        return free()

    body = {**BODY, "n": 4, "max_tokens": 60, "stream": True, "logprobs": 2, "cache_salt": "left"}
    before = settled()
    chance = random.Random(9)

    def leave(number: int) -> None:
        with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=target.http, trust_env=False, timeout=30.0) as client:
            asked = {**body, "prompt": [5, 6, 7 + number % 40], "stream": number % 3 > 0}
            timeout = chance.choice([0.002, 0.01, 0.03, 0.1])
            with client.stream("POST", COMPLETIONS, json=asked, timeout=timeout) as answer:
                for _ in zip(range(number % 7), answer.iter_lines(), strict=False):
                    pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(150)))
    # A worker tells its load with its lease, every 1.7 s; a hand-off that nobody ended would hold its blocks for 30 s.
    end_s = time.monotonic() + 20.0
    while (now := settled()) != before:
        assert time.monotonic() < end_s, (now, before)


def test_ids_that_two_tenants_share_mix_up_nothing(keyed: BoundPorts) -> None:
    """An id is a client's to choose: another tenant's request of the same id is another request."""

    def ask(number: int) -> tuple[str, str]:
        tenant = ("red", "blue")[number % 2]
        prompt = {"red": [5, 6, 7, 8], "blue": [9, 10, 11, 12]}[tenant]
        headers = {"authorization": f"Bearer {KEYS[tenant]}", "x-request-id": "the-same"}
        with httpx.Client(base_url=f"http://127.0.0.1:{keyed.http_port}", trust_env=False, timeout=60.0, headers=headers) as client:
            while (answer := client.post(COMPLETIONS, json={**BODY, "prompt": prompt, "max_tokens": 12})).status_code == 429:
                time.sleep(float(answer.headers["retry-after"]))
        assert answer.status_code == 200, answer.text
        return tenant, answer.json()["choices"][0]["text"]

    alone = dict(ask(number) for number in range(2))
    with ThreadPoolExecutor(12) as pool:
        assert {text for tenant, text in pool.map(ask, range(36)) if tenant == "red"} == {alone["red"]}
        assert {text for tenant, text in pool.map(ask, range(36)) if tenant == "blue"} == {alone["blue"]}


def test_keys_that_are_patterns_or_queries_are_keys_of_nobody(keyed: BoundPorts) -> None:
    """LiteLLM put the Authorization header into a query (CVE-2026-42208), and knew keys by their beginnings (CVE-2026-35030)."""
    keys = [
        "*",
        "%",
        "' OR '1'='1",
        "red*",
        KEYS["red"][:20],
        KEYS["red"] + "x",
        "{red}",
        "$(id)",
        "\u0130",
        "../red",
        "null",
        "[]",
    ]
    with httpx.Client(base_url=f"http://127.0.0.1:{keyed.http_port}", trust_env=False, timeout=60.0) as client:
        for key in keys:
            for path in (COMPLETIONS, MESSAGES):
                answer = client.post(path, json=BODY, headers={b"authorization": f"Bearer {key}".encode()})
                assert answer.status_code == 401, key
        red = {"authorization": f"Bearer {KEYS['red']}"}
        for name in ("*", "?", "resp_*", "resp_[0-9]*", "x\n", "x:y", "{x}", "x y", "\u0000", "a" * 100_000, "..", "%2a"):
            body = {"model": "target", "input": "x", "max_output_tokens": 1, "previous_response_id": name}
            assert client.post(RESPONSES, json=body, headers=red).status_code == 400, name


def test_a_silent_crowd_at_every_port_keeps_nobody_out(target: Target, http: httpx.Client) -> None:
    ports = {int(target.http.rpartition(":")[2]), int(target.grpc.rpartition(":")[2])}
    ports.add(int(target.deployment.directory_address.rpartition(":")[2]))
    for info in target.workers.values():
        ports |= {int(text.rpartition(":")[2]) for text in (info.endpoint.rpc,) if text}
        ports |= {
            int(each.partition("?")[0].rpartition(":")[2])
            for each in info.endpoint.data.split()
            if each.partition("?")[0].rpartition(":")[2].isdecimal()
        }
    held: list[socket.socket] = []
    try:
        for port in ports:
            for number in range(2_000 // len(ports)):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", port), 5.0))
                    if number % 3 == 1:
                        held[-1].send(b"\x16\x03\x01")  # the beginning of a handshake
                    elif number % 3 == 2:
                        held[-1].send(b"PRI * HT")
        assert len(held) > 1_000
        assert target.ask() == target.expected
    finally:
        for each in held:
            each.close()


def test_wrapped_bodies_are_unwrapped_once(http: httpx.Client) -> None:
    import gzip

    packed = json.dumps(BODY).encode()
    for _ in range(3):
        packed = gzip.compress(packed)
    for named in ("gzip, gzip, gzip", "gzip,deflate", "gzip;q=1", "GZIP\tgzip", "x-gzip", "br", "identity, gzip"):
        answer = http.post(COMPLETIONS, content=packed, headers={"content-encoding": named, "content-type": "application/json"})
        assert answer.status_code in (400, 415), (named, answer.text[:100])
