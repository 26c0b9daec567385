"""API keys (request speed). Must not know: the doors."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from antiphon.core.errors import Unauthenticated


class ApiKeys:
    """The accepted keys; none = everybody may come in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys if key]

    def check(self, authorization: str | None) -> str:
        """Accept an Authorization header.

        Returns:
            The tenant: a name for the key that tells nothing of it; "" where no keys are asked for.

        Raises:
            Unauthenticated: it is missing, or its key is not among the accepted.
        """
        if not self._keys:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("no API key: send it as 'Authorization: Bearer <key>'")
        given = key.strip().encode()
        # Every key is compared, in constant time each, so that timing tells nothing.
        matches = [hmac.compare_digest(given, accepted) for accepted in self._keys]
        if not any(matches):
            raise Unauthenticated("the API key is not valid")
        return hashlib.blake2b(given, digest_size=12, person=b"antiphon.tenant").hexdigest()


def cache_salt(tenant: str, asked: str) -> str:
    """What separates the prefix caches of tenants, and within one those that its client asked to keep apart.

    Of fixed length, since salts travel with hand-offs.
    """
    if not tenant:
        return asked
    return hashlib.blake2b(f"{tenant}\0{asked}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def keys_from(text: str | None) -> frozenset[str]:
    """The keys of a comma-separated list."""
    return frozenset(key.strip() for key in (text or "").split(",") if key.strip())
