"""The pages at ``/`` and ``/docs``, and what they show that no other door has: a traced step, the types (request speed).

Files come with the package and ask for nothing from elsewhere; a browser is told so (Content-Security-Policy). They are the same
for everybody: what a key is asked for, the page asks the other doors for. Must not know: how requests are answered.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib import resources
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from antiphon.core.errors import InvalidInput
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.openai.http_io import error_response
from antiphon.gateway.web.openapi import openapi
from antiphon.gateway.web.traced_step import GatewaySteps

_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked again each time, and answered with 304
}
_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def add_web_routes(app: FastAPI, gateway: Gateway) -> None:
    """Put the page, the API reference, their files and ``POST /trace`` into the application."""
    steps = GatewaySteps(lambda: gateway.view.workers)
    document = openapi(unknown_fields=gateway.config.unknown_fields, with_keys=not gateway.keys.is_open, more=gateway.published)
    folder = resources.files("antiphon.gateway.web") / "static"
    files = {each.name: each.read_bytes() for each in folder.iterdir() if each.name.rpartition(".")[2] in _KINDS}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file(request, "page.html", files["page.html"])

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _file(request, "docs.html", files["docs.html"])

    @app.get("/openapi.json", include_in_schema=False)
    async def described() -> Response:
        return JSONResponse(document)

    @app.get("/web/{name}", include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        if name not in files:
            return Response(status_code=404, headers=_HEADERS)
        return _file(request, name, files[name])

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon(request: Request) -> Response:
        return _file(request, "icon.svg", files["icon.svg"])

    @app.post("/trace", summary="Record what the workers do for a moment, and show one step of it")
    async def trace(request: Request) -> Response:
        try:
            gateway.keys.check(request.headers.get("authorization"), admin=True)
            asked = request.query_params
            found = await steps.trace(asked.get("deployment", ""), _seconds(asked.get("seconds")))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            gateway.refused(error)
            return error_response(error)
        return JSONResponse(asdict(found))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"{text[:64]!r} is no number of seconds", "seconds") from error


def _file(request: Request, name: str, content: bytes) -> Response:
    tag = f'"{hashlib.blake2b(content, digest_size=9).hexdigest()}"'
    headers = {**_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_KINDS[name.rpartition(".")[2]], headers=headers)
