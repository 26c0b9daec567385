"""Keeps pages of other sites off a door that asks for no key: a browser lends them its user's place (request speed).

A page of any site may send a plain POST to an address of its reader's machine or network, and work starts; and a site that lets its
own name point to that address a moment later (DNS rebinding) reads the answers, too, since to the browser they are its own. Where
keys are asked for neither gets further than 401: a browser adds none. Must not know: any route.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from antiphon.core.errors import PermissionDenied
from antiphon.gateway.anthropic.errors import error_at

# No site of the internet has such a name (RFC 6761, RFC 6762, ICANN's resolution of 2024 on .internal).
_LOCAL_NAMES: Final = (".localhost", ".local", ".internal")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


class OtherSite(PermissionDenied):
    """A page of another site asks."""

    code = "other_site"


class OwnSites:
    """Middleware of a door that asks for no key. Refused is

    - what a page of another origin sends (its browser says so in ``Origin``), but those of ``origins``;
    - at an address of this machine alone: a name that is neither of this machine nor of ``origins``. Elsewhere names are
      the network's, and nothing tells one of a service from a forged one.

    Args:
        app: what is served.
        origins: as browsers write them, "*" = all.
        is_local: the door is bound to a loopback address.
        refused: counts what was refused.
    """

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], *, is_local: bool, refused: Callable[[Exception], None] = lambda _error: None
    ) -> None:
        self._app = app
        self._refused = refused
        self._origins = frozenset(origins)
        self._hosts = frozenset(_name_of(each.partition("://")[2]) for each in origins)
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and "*" not in self._origins:
            headers = Headers(scope=scope)
            error = self._why_not(headers.get("host", ""), headers.get("origin"))
            if error is not None:
                self._refused(error)
                await error_at(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _why_not(self, host: str, origin: str | None) -> OtherSite | None:
        remedy = "name it in endpoint.corsOrigins, or ask for API keys"
        if self._is_local and not self._is_own(_name_of(host)):
            return OtherSite(
                f"this door is this machine's and asks for no key, and {host[:256]!r} is no name of it: {remedy}", "host"
            )
        if origin is None or origin in self._origins or _authority(origin) == host.lower():
            return None
        return OtherSite(f"pages of {origin[:256]!r} may not ask a door without keys: {remedy}", "origin")

    def _is_own(self, name: str) -> bool:
        if name in self._hosts or "." not in name or name.endswith(_LOCAL_NAMES):
            return True
        return _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address that is bound."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name_of(host: str) -> str:
    """A Host header, or an origin's end, without its port."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _authority(origin: str) -> str:
    """An origin as its requests' Host header has it, "" for one that has none (``null``)."""
    scheme, _, authority = origin.lower().partition("://")
    return authority.removesuffix(_DEFAULT_PORTS.get(scheme, "\0"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
