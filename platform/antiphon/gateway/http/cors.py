"""Which other origins' pages may ask from a browser (request speed). Must not know: any route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

# What a page may read beside the body: what our answers say in headers.
_SHOWN: Final = ("x-request-id", "warning", "retry-after", "allow", "www-authenticate")
_KEPT_S: Final = 3600  # a browser asks again for what it may do


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application, open to pages of ``origins``; without any, no other origin's page may read an answer."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
        allow_headers=["*"],  # clients send many of their own; what they may ask for is the keys' matter
        expose_headers=list(_SHOWN),
        max_age=_KEPT_S,
    )
