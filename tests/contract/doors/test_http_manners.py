"""HEAD, OPTIONS, 405 and a slash at the end, through a whole gateway."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

PATHS = ("/health", "/ready", "/v1/models", "/status", "/metrics")


async def test_head_is_get_without_its_body(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        for path in PATHS:
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
        assert (await client.head("/v1/completions")).status_code == 405


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/health", "GET, HEAD, OPTIONS"), ("/v1/chat/completions", "OPTIONS, POST"), ("/v1/models/tiny", "GET, HEAD, OPTIONS")],
)
async def test_options_and_405_name_what_is_allowed(tmp_path: Path, path: str, allowed: str) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        options = await client.options(path)
        assert (options.status_code, options.headers["allow"]) == (204, allowed)
        refused = await client.delete(path)
        assert refused.status_code == 405
        assert refused.headers["allow"] == allowed
        assert allowed in refused.json()["error"]["message"]
        assert (await client.options("/nowhere")).status_code == 404


async def test_a_slash_at_the_end_changes_nothing(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        listed = await client.get("/v1/models/")
        assert listed.json()["object"] == "list"
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        assert (await client.post("/v1/completions/", json=body)).status_code == 200


async def test_a_path_with_a_line_end_is_no_path(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        for path in (*PATHS, "/v1/models/tiny", "/openapi.json", "/"):
            refused = await client.get(f"{path}%0A")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found"), path
        assert (await client.post("/v1/completions%0A", json={"model": "tiny", "prompt": "a"})).status_code == 404


async def test_bodies_may_be_compressed(tmp_path: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:

        async def post(content: bytes, encoding: str) -> httpx.Response:
            return await client.post("/v1/completions", content=content, headers={"content-encoding": encoding})

        plain = await post(body, "identity")
        packed = await post(gzip.compress(body), "gzip")
        assert packed.status_code == 200
        assert packed.json()["usage"] == plain.json()["usage"]
        broken = await post(gzip.compress(body)[:-4], "gzip")
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "content-encoding")
        unknown = await post(body, "br")
        assert (unknown.status_code, unknown.headers["accept-encoding"]) == (415, "gzip, deflate")
        assert unknown.json()["error"]["code"] == "unsupported_encoding"
        bomb = await post(gzip.compress(bytes(200 * 2**20)), "gzip")
        assert bomb.status_code == 413


async def test_a_byte_order_mark_before_the_body_is_skipped(tmp_path: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        assert (await client.post("/v1/completions", content=b"\xef\xbb\xbf" + body)).status_code == 200


async def test_refusals_before_a_route_have_the_shape_of_their_door(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        nowhere = await client.post("/v1/messages/batches", json={"requests": []})
        assert (nowhere.status_code, nowhere.json()["type"], nowhere.json()["error"]["type"]) == (404, "error", "not_found_error")
        method = await client.get("/v1/messages")
        assert (method.status_code, method.json()["type"]) == (405, "error")
        assert method.headers["allow"] == "OPTIONS, POST"
        packed = await client.post("/v1/messages", content=b"{}", headers={"content-encoding": "br"})
        assert (packed.status_code, packed.json()["type"]) == (415, "error")
        assert (await client.get("/v1/messagesx")).json()["error"]["code"] == "not_found"
