"""Every refusal is in antiphon_requests_failed_total, by its code and once, at whatever door and however early it came."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from antiphon.client import Client
from antiphon.core.errors import AntiphonError
from antiphon.telemetry import setup

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[1] / "doors" / "fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

KEY = {"authorization": "Bearer k"}
MESSAGES = [{"role": "user", "content": "a"}]
BAD_HEAT = {"model": "tiny", "messages": MESSAGES, "temperature": 9, "max_tokens": 1}

# Method, path, body, headers, and the code that it is counted under.
HTTP: list[tuple[str, str, dict[str, Any] | None, dict[str, str], str]] = [
    ("POST", "/v1/chat/completions", BAD_HEAT, KEY, "invalid_value"),
    ("POST", "/v1/chat/completions", {**BAD_HEAT, "temperature": 1, "model": "none"}, KEY, "model_not_found"),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"}, {}, "invalid_api_key"),
    ("POST", "/v1/responses", {"model": "tiny"}, KEY, "invalid_value"),
    ("POST", "/v1/messages", BAD_HEAT, KEY, "invalid_value"),
    ("POST", "/v1/messages/count_tokens", {"model": "tiny"}, KEY, "invalid_value"),
    ("POST", "/tokenize", {"model": "tiny"}, KEY, "invalid_value"),
    ("POST", "/detokenize", {"model": "tiny"}, KEY, "invalid_value"),
    ("GET", "/v1/models", None, {}, "invalid_api_key"),
    ("GET", "/v1/models/none", None, KEY, "model_not_found"),
    ("GET", "/v1/responses/none", None, KEY, "not_found"),
    ("GET", "/status", None, {}, "invalid_api_key"),
    ("POST", "/trace?seconds=9", None, KEY, "invalid_value"),
    ("GET", "/nowhere", None, KEY, "not_found"),
    ("DELETE", "/v1/models", None, KEY, "method_not_allowed"),
]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Any]:
    with setup("antiphon-gateway-test") as telemetry:
        async with fake.world(tmp_path, telemetry=telemetry, gateway={"api_keys": frozenset({"k"})}) as made:
            yield made


async def failed(world: Any) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        text = (await client.get("/metrics")).text
    counted: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "antiphon_requests_failed_total":
                counted[sample.labels["error_type"]] = counted.get(sample.labels["error_type"], 0.0) + sample.value
    return counted


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {code: after[code] - before.get(code, 0.0) for code in after if after[code] != before.get(code, 0.0)}


async def test_every_http_refusal_is_counted_once_by_its_code(world: Any) -> None:
    async with httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        for method, path, body, headers, code in HTTP:
            before = await failed(world)
            answer = await client.request(method, path, json=body, headers=headers)
            assert answer.status_code >= 400
            assert added(before, await failed(world)) == {code: 1.0}, (method, path, answer.text)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", "headers_too_large"),
        (b"no http at all\r\n\r\n", "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", "bad_request"),
    ],
)
async def test_what_no_route_sees_is_counted_too(world: Any, sent: bytes, code: str) -> None:
    before = await failed(world)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports.http_port)
    writer.write(sent)
    await writer.drain()
    assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 4")
    writer.close()
    assert added(before, await failed(world)) == {code: 1.0}


async def test_grpc_refusals_are_counted(world: Any) -> None:
    def ask(key: str, **options: Any) -> None:
        with Client(world.grpc_address, api_key=key) as client, pytest.raises(AntiphonError):
            client.generate(**options)

    before = await failed(world)
    await asyncio.to_thread(ask, "k", model="none", prompt="a", max_tokens=1)
    await asyncio.to_thread(ask, "wrong", model="tiny", prompt="a", max_tokens=1)
    await asyncio.to_thread(ask, "k", model="tiny", prompt="a", max_tokens=1, temperature=9.0)
    assert added(before, await failed(world)) == {"model_not_found": 1.0, "invalid_api_key": 1.0, "invalid_value": 1.0}
