"""The compositions' door by itself: HTTP's manners, refusals that are counted, paths that are published."""

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from antiphon.coe.serving.doors.http import CoeDoor
from antiphon.coe.serving.doors.published import OPERATIONS, ROUTES
from antiphon.gateway.access.keys import ApiKeys
from antiphon.gateway.http.manners import Manners
from antiphon.gateway.web.openapi import openapi


def door(counted: list[tuple[str, object]], *, keys: frozenset[str] = frozenset()) -> httpx.AsyncClient:
    def refused(error: Exception, model: object = None) -> None:
        counted.append((str(getattr(error, "code", type(error).__name__)), model))

    inner = CoeDoor(Starlette(), {}, keys=ApiKeys(keys), max_request_bytes=100, refused=refused)
    app = Manners(inner, ROUTES, refused)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://door")


async def test_what_the_door_refuses_by_itself_is_counted_by_its_code() -> None:
    counted: list[tuple[str, object]] = []
    async with door(counted) as client:
        chat = await client.post("/v1/chat/completions", json={"model": "coe/none", "messages": []})
        await client.post("/v1/route", json={"model": "coe/none"})
        await client.post("/v1/route", content=b"x" * 101)
        await client.post("/v1/feedback", json={"score": 1})
        await client.get("/v1/decisions/none")
    assert chat.status_code == 404
    assert counted[:2] == [("model_not_found", "coe/none"), ("model_not_found", None)]
    assert len(counted) == 5
    counted.clear()
    async with door(counted, keys=frozenset({"secret"})) as client:
        assert (await client.get("/v1/experts")).status_code == 401
        assert (await client.post("/v1/completions", json={"model": "coe/none"})).status_code == 401
    assert [code for code, _ in counted] == ["invalid_api_key", "invalid_api_key"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/route", "OPTIONS, POST"),
        ("/v1/feedback/", "OPTIONS, POST"),
        ("/v1/experts", "GET, HEAD, OPTIONS"),
        ("/v1/decisions/d", "GET, HEAD, OPTIONS"),
        ("/v1/models/coe/team", "GET, HEAD, OPTIONS"),
    ],
)
async def test_each_path_tells_its_methods(path: str, allowed: str) -> None:
    counted: list[tuple[str, object]] = []
    async with door(counted) as client:
        asked = await client.options(path)
        assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
        refused = await client.delete(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert refused.json()["error"]["code"] == "method_not_allowed"
    assert [code for code, _ in counted] == ["method_not_allowed"]


async def test_a_slash_at_the_end_and_head_are_taken() -> None:
    async with door([]) as client:
        assert (await client.get("/v1/experts/")).json() == {"object": "list", "data": []}
        assert (await client.head("/v1/experts")).status_code == 200


def test_its_paths_are_published_with_the_others() -> None:
    document: dict[str, Any] = openapi(unknown_fields="refuse", with_keys=True, more=OPERATIONS)
    for operation in OPERATIONS:
        published = document["paths"][operation.path][operation.method]
        assert "$ref" in str(published["responses"]["200"])
        assert published["security"] == [{"key": []}]
    assert "/v1/route" not in openapi(unknown_fields="refuse", with_keys=True)["paths"]
