"""What /openapi.json says is what the doors take and answer; and which origins' pages may ask."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from antiphon import gateway
from antiphon.core.document.serving import EndpointSpec
from antiphon.core.errors import AntiphonError
from antiphon.gateway.web.openapi import openapi

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[1] / "doors" / "fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

CHAT = [{"role": "user", "content": "what is it?"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "what"}]}, {"role": "assistant", "content": None}, CHAT[0]]
MANY = {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": ["zzz"], "seed": 1}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}"
)
ANTHROPIC_TOOL = {"name": "weather", "input_schema": {"type": "object"}}

# What clients send, by path; each is taken, and so is it by the published schema.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": CHAT, **MANY}),
    ("/v1/chat/completions", {"messages": PARTS, "max_completion_tokens": 3, "tools": [TOOL], "stop": "zzz"}),
    ("/v1/chat/completions", {"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}, **MANY}),
    ("/v1/completions", {"prompt": "abc", "max_tokens": 3, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": ["abc", "d"], "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3, "prompt_logprobs": 1}),
    ("/v1/responses", {"input": "abc", "max_output_tokens": 3}),
    ("/v1/responses", {"input": CHAT, "max_output_tokens": 3, "stream": True}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 3, "system": "be brief", "tools": [ANTHROPIC_TOOL]}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 3, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": CHAT}),
    ("/tokenize", {"prompt": "abc", "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT}),
    ("/detokenize", {"tokens": [5, 6]}),
]
GETS = ("/v1/models", "/v1/models/tiny", "/health", "/ready", "/status")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi(unknown_fields="ignore", with_keys=False)


@asynccontextmanager
async def asking(tmp_path: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with fake.world(tmp_path, **options) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        yield client


def check(document: dict[str, Any], schema: dict[str, Any], value: Any, *, whole: bool) -> None:
    """``whole``: fields that the schema does not name are wrong, too."""
    known = copy.deepcopy({"components": document["components"]})
    if whole:
        for each in known["components"]["schemas"].values():
            if "properties" in each:
                each["additionalProperties"] = each.get("title") == "NamedEvent"
    jsonschema.Draft202012Validator({**known, **schema}).validate(value)


def at(document: dict[str, Any], path: str, method: str = "post") -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path.replace("/v1/models/tiny", "/v1/models/{name}")][method]
    return found


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_what_is_taken_and_answered_is_as_published(
    tmp_path: Path, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    body = {"model": "tiny", **body}
    operation = at(document, path)
    check(document, operation["requestBody"]["content"]["application/json"]["schema"], body, whole=True)
    content = operation["responses"]["200"]["content"]
    async with asking(tmp_path, eos_after=3, chat_template=TEMPLATE) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            check(document, content["application/json"]["schema"], answer.json(), whole=True)
            return
        # An event stream's lines end in LF or CR alone; a text may hold what str.splitlines also takes for an end.
        lines = re.split(r"\r\n|\r|\n", answer.text)
        events = [line[6:] for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
        assert events
        for event in events:
            check(document, content["text/event-stream"]["schema"], json.loads(event), whole=True)


async def test_every_path_that_is_served_is_published_and_errors_have_their_shape(tmp_path: Path, document: dict[str, Any]) -> None:
    async with asking(tmp_path) as client:
        published = (await client.get("/openapi.json")).json()
        assert published == document
        for path in GETS:
            schema = at(document, path, "get")["responses"]["200"]["content"]["application/json"]["schema"]
            check(document, schema, (await client.get(path)).json(), whole=True)
        for path, body in (
            ("/v1/chat/completions", {"model": "tiny"}),
            ("/v1/messages", {"model": "none"}),
            ("/trace?seconds=9", {}),
        ):
            error = at(document, path.partition("?")[0])["responses"]["default"]["content"]["application/json"]["schema"]
            refused = await client.post(path, json=body)
            assert refused.status_code in (400, 404)
            check(document, error, refused.json(), whole=True)
        for path, methods in document["paths"].items():
            asked = path.replace("{name}", "tiny").replace("{response_id}", "r")
            allowed = (await client.options(asked)).headers["allow"].lower()
            assert all(method in allowed for method in methods), path
        page = await client.get("/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "://" not in page.text


def test_every_route_is_published(document: dict[str, Any]) -> None:
    """Other names of a published path, and the pages' own files, apart."""
    served = set()
    for path in (Path(gateway.__file__).parent).rglob("*.py"):
        served |= set(re.findall(r'@app\.(?:get|post)\("([^"]+)"', path.read_text()))
    others = {"/", "/docs", "/openapi.json", "/favicon.ico", "/web/{name}", "/rerank", "/v2/rerank", "/score"}
    assert {path.replace(":path", "") for path in served} - others == set(document["paths"])


def test_keys_are_part_of_the_document_where_they_are_asked_for(document: dict[str, Any]) -> None:
    keyed = openapi(unknown_fields="refuse", with_keys=True)
    assert at(keyed, "/v1/chat/completions")["security"] == [{"key": []}]
    assert "security" not in at(keyed, "/health", "get")
    assert "security" not in at(document, "/v1/chat/completions")
    assert keyed["components"]["schemas"]["ChatBody"]["additionalProperties"] is False
    assert "additionalProperties" not in document["components"]["schemas"]["ChatBody"]


async def test_pages_of_the_origins_in_the_document_may_ask_and_no_others(tmp_path: Path) -> None:
    origin = "https://app.example.org"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    async with asking(tmp_path, gateway={"cors_origins": (origin,), "api_keys": frozenset({"k"})}) as client:
        asked = await client.options("/v1/chat/completions", headers={"origin": origin, **preflight})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = await client.post("/v1/chat/completions", headers={"origin": origin}, json={})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)  # the page may read why
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = await client.options("/v1/chat/completions", headers={"origin": "https://evil.example", **preflight})
        assert "access-control-allow-origin" not in other.headers
    async with asking(tmp_path / "none") as client:
        silent = await client.get("/health", headers={"origin": origin})
        assert "access-control-allow-origin" not in silent.headers


@pytest.mark.parametrize(
    ("origin", "taken"),
    [
        ("*", True),
        ("https://app.example.org", True),
        ("http://localhost:3000", True),
        ("http://[::1]:3000", True),
        ("https://app.example.org/", False),
        ("https://app.example.org/chat", False),
        ("app.example.org", False),
        ("https://app.example.org\n", False),
        ("null", False),
    ],
)
def test_an_origin_is_written_as_browsers_write_it(origin: str, taken: bool) -> None:
    if taken:
        assert EndpointSpec.model_validate({"corsOrigins": [origin]}).cors_origins == (origin,)
        return
    with pytest.raises((AntiphonError, ValueError), match="corsOrigins"):
        EndpointSpec.model_validate({"corsOrigins": [origin]})
