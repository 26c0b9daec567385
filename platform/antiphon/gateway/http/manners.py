"""HTTP's manners for every route of the door: HEAD, OPTIONS, 405, a slash at the end of a path, compressed bodies (request speed).

Must not know: what a route answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from fastapi.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from antiphon.gateway.anthropic.errors import error_at
from antiphon.gateway.http.encodings import TAKEN, EncodingUnknown, decoded
from antiphon.gateway.openai.http_io import MethodNotAllowed, NotFound

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class Manners:
    """Middleware.

    Args:
        app: what is served.
        routes: its routes, to say which methods a path has.
        refused: counts what was refused.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], refused: Callable[[Exception], None]) -> None:
        self._refused = refused
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        if _CONTROL.search(path):  # a route's pattern ends with `$`, which a line end passes
            await self._refuse(path, NotFound(f"there is no {path!r}"), {})(scope, receive, send)
            return
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/") or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        method = scope["method"]
        allowed = self.allowed(scope)
        if method == "OPTIONS" and allowed:
            await Response(status_code=204, headers={"allow": ", ".join(allowed)})(scope, receive, send)
            return
        if allowed and method not in allowed:
            named = ", ".join(allowed)
            error = MethodNotAllowed(f"there is no {method} {path}; allowed: {named}")
            await self._refuse(path, error, {"allow": named})(scope, receive, send)
            return
        if method == "HEAD" and allowed:
            scope = {**scope, "method": "GET"}  # the server leaves out the body
        try:
            scope, receive = decoded(scope, receive)
        except EncodingUnknown as unknown:
            await self._refuse(path, unknown, {"accept-encoding": TAKEN})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refuse(self, path: str, error: Exception, headers: dict[str, str]) -> Response:
        self._refused(error)
        response = error_at(path, error)
        response.headers.update(headers)
        return response

    def allowed(self, scope: Scope) -> list[str]:
        """The methods that the path has; empty where there is no such path."""
        found: set[str] = set()
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                found |= set(route.methods or ())
        if "GET" in found:
            found.add("HEAD")
        return sorted(found | {"OPTIONS"}) if found else []
