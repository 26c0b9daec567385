"""API keys: who comes in, as which tenant, and how far (request speed). Must not know: the doors."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable

from antiphon.core.budget import NO_LIMITS, TenantLimits
from antiphon.core.errors import PermissionDenied, Unauthenticated
from antiphon.core.identity import Identity, own_identity
from antiphon.gateway.access.key_file import KeyFile
from antiphon.gateway.access.key_lines import KeyLine, digest_of

OWN_TENANT = "antiphon"  # what the deployment's own processes ask
_OWN_PURPOSE = "api key"


class ApiKeys:
    """The accepted keys; neither keys nor a file = everybody may come in, to everything.

    Args:
        keys: Plain ones, of the environment; each may do everything, and is a tenant of its own.
        file: Hashed ones, with names and scopes.
        identity: The deployment's, whose own processes may come in, too; None = this process'.
        wall: Seconds since 1970.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        file: KeyFile | None = None,
        *,
        identity: Identity | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._plain = tuple(KeyLine(tenant=_name_of(key), scope="admin", digest=digest_of(key)) for key in sorted(keys) if key)
        self._file = file
        self._wall = wall
        self.is_open = not self._plain and file is None
        if not self.is_open:
            own = KeyLine(tenant=OWN_TENANT, scope="admin", digest=digest_of(own_key(identity)))
            self._plain += (own,)

    def check(self, authorization: str | None, *, admin: bool = False) -> str:
        """Accept an Authorization header.

        Args:
            authorization: The header; None = there is none.
            admin: What is asked for is for those who run the deployment.

        Returns:
            The tenant: the name that stands beside its key, or one made of the key that tells nothing of it; "" where no keys
            are asked for.

        Raises:
            Unauthenticated: it is missing, or its key is not among the accepted, or has expired.
            PermissionDenied: its key is a user's, and ``admin`` is asked for.
        """
        if self.is_open:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("no API key: send it as 'Authorization: Bearer <key>'")
        given = digest_of(key.strip())
        # All are compared, in constant time each, so that timing tells nothing.
        lines = self._plain if self._file is None else self._plain + self._file.lines()
        matches = [line for line in lines if hmac.compare_digest(given, line.digest)]
        if not matches:
            raise Unauthenticated("the API key is not valid")
        now_s = self._wall()
        living = [line for line in matches if line.expires_s is None or now_s < line.expires_s]
        if not living:
            raise Unauthenticated("the API key has expired")
        if admin and living[0].scope != "admin":
            raise PermissionDenied("this API key is for asking models; this needs one of scope admin")
        return living[0].tenant

    def limits(self, tenant: str) -> TenantLimits:
        """What a tenant may use; without limits where no line of the file says some."""
        return NO_LIMITS if self._file is None else self._file.limits(tenant)


def own_key(identity: Identity | None = None) -> str:
    """The key by which a deployment's own processes come in at its doors; only who has the deployment's key can work it out."""
    return "own-" + (own_identity() if identity is None else identity).derive(_OWN_PURPOSE).hex()


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


def _name_of(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=12, person=b"antiphon.tenant").hexdigest()
