"""Refuses by its headers alone what would be refused whatever its body says (request speed).

A flood is refused far more often than it is answered: whoever stays within his share would pay for its parsing, tokenizing and
placing. What is not refused here meets the same checks once more, exactly, when it is known what it asks. Must not know: bodies.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from antiphon.core.errors import AntiphonError
from antiphon.gateway.anthropic.errors import error_at
from antiphon.gateway.gateway import Gateway

_BY_KEY_OF_ANTHROPIC: Final = "/v1/messages"
_GENERATING: Final = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", _BY_KEY_OF_ANTHROPIC})
_RESUMES: Final = b"last-event-id"


class EarlyRefusal:
    """Middleware, before any route and after what gives requests their ids."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] not in _GENERATING or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        found = dict(scope["headers"])  # those that decide here can't be given twice
        key = found.get(b"x-api-key") if path == _BY_KEY_OF_ANTHROPIC else None
        given = found.get(b"authorization") if key is None else b"Bearer " + key
        try:
            tenant = self._gateway.admit(None if given is None else given.decode("latin-1"))
            if _RESUMES not in found:
                self._gateway.check_room(tenant)
        except AntiphonError as error:
            self._gateway.refused(error)
            await error_at(path, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)
