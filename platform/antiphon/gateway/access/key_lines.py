"""Lines of a key file: one hashed API key each, with its tenant, scope and expiry (values; control speed).

    team-a  user   sha256:9f86d0...  expires=2027-01-31
    team-b  user   sha256:04aa7f...  requests=60 tokens=100000 streams=4
    ops     admin  sha256:60303a...              # a comment

Several lines of one tenant are its keys: the new one beside the old while keys are changed. Limits (requests and tokens a minute,
requests at once) are the tenant's: its lines say the same, or nothing. The hash is plain SHA-256 of the key,
which is enough because keys are long and random, and lets anybody write a line with ``sha256sum``. Must not know: files.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from antiphon.core.budget import NO_LIMITS, TenantLimits
from antiphon.core.errors import InvalidInput

Scope = Literal["user", "admin"]

MAX_KEYS: Final = 10_000
MIN_KEY_CHARS: Final = 20
_KEY_PREFIX: Final = "ak-"
_HASH_PREFIX: Final = "sha256:"
_MAX_LIMIT: Final = 1 << 40
_OPTIONS: Final = {"requests_per_min": "requests", "tokens_per_min": "tokens", "num_streams": "streams"}
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HASH: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLine:
    """One accepted key."""

    tenant: str
    scope: Scope
    digest: bytes  # of the key, SHA-256
    expires_s: float | None = None  # seconds since 1970; None = never
    limits: TenantLimits = NO_LIMITS

    def __str__(self) -> str:
        words = [self.tenant, self.scope, _HASH_PREFIX + self.digest.hex()]
        if self.expires_s is not None:
            words.append(f"expires={datetime.datetime.fromtimestamp(self.expires_s, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}")
        return " ".join([*words, *self.limit_words])

    @property
    def limit_words(self) -> list[str]:
        """What its tenant has, as a line says it."""
        limits = {_OPTIONS[name]: getattr(self.limits, name) for name in _OPTIONS}
        return [f"{option}={number}" for option, number in limits.items() if number is not None]


def new_key() -> str:
    """A key with 256 random bits."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_line(tenant: str, scope: str, key: str, expires: str | None = None, limits: TenantLimits = NO_LIMITS) -> KeyLine:
    """The line of a key.

    Args:
        tenant: Whose it is.
        scope: user or admin.
        key: The key itself.
        expires: As in a line; None = never.
        limits: The tenant's.

    Raises:
        InvalidInput: the name or the expiry can't be read, or the key is too short to be kept as a plain hash.
    """
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInput(f"a key has at least {MIN_KEY_CHARS} printable characters and no blanks; best a random one", "key")
    options = [] if expires is None else [f"expires={expires}"]
    return replace(_line([tenant, scope, _HASH_PREFIX + digest_of(key).hex(), *options], "key"), limits=limits)


def limits_of(lines: Iterable[KeyLine]) -> dict[str, TenantLimits]:
    """Those of every tenant that has some.

    Raises:
        InvalidInput: two lines of one tenant say different ones.
    """
    found: dict[str, TenantLimits] = {}
    for line in lines:
        if not line.limits.is_none and found.setdefault(line.tenant, line.limits) != line.limits:
            raise InvalidInput(f"two lines of {line.tenant} have different limits")
    return found


def parse_lines(text: str) -> tuple[KeyLine, ...]:
    """All keys of a file's text; blank lines and what follows a # are left out.

    Raises:
        InvalidInput: a line is wrong, is named twice, or there is none.
    """
    found: dict[bytes, KeyLine] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        words = raw.partition("#")[0].split()
        if not words:
            continue
        line = _line(words, f"line {number}")
        if line.digest in found:
            raise InvalidInput(f"line {number}: the same key stands in another line", f"line {number}")
        found[line.digest] = line
    if not found:
        raise InvalidInput("it holds no key")
    if len(found) > MAX_KEYS:
        raise InvalidInput(f"it holds {len(found)} keys, at most {MAX_KEYS} are taken")
    limits_of(found.values())
    return tuple(found.values())


def _line(words: list[str], where: str) -> KeyLine:
    if len(words) < 3:
        raise InvalidInput(f"{where}: expected <tenant> <user or admin> sha256:<64 hex digits>", where)
    tenant, scope, hashed, *options = words
    if _TENANT.fullmatch(tenant) is None:
        raise InvalidInput(f"{where}: {tenant[:64]!r} is no tenant's name: 1 to 63 of A-Z a-z 0-9 . _ -", where)
    if scope not in ("user", "admin"):
        raise InvalidInput(f"{where}: the scope is {scope[:64]!r}, expected user or admin", where)
    matched = _HASH.fullmatch(hashed)
    if matched is None:
        raise InvalidInput(f"{where}: expected sha256: and 64 hex digits as the third word", where)
    given: dict[str, str] = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator or name not in ("expires", *_OPTIONS.values()) or name in given:
            known = "expires=<date>, requests=, tokens=, streams=<number>"
            raise InvalidInput(f"{where}: {option[:64]!r} is not expected; known: {known}", where)
        given[name] = value
    return KeyLine(
        tenant=tenant,
        scope="admin" if scope == "admin" else "user",
        digest=bytes.fromhex(matched.group(1)),
        expires_s=_seconds(given["expires"], where) if "expires" in given else None,
        limits=TenantLimits(**{field: _number(given, option, where) for field, option in _OPTIONS.items()}),
    )


def _number(given: dict[str, str], option: str, where: str) -> int | None:
    if option not in given:
        return None
    text = given[option]
    if not (text.isascii() and text.isdecimal() and len(text) <= 13 and 1 <= int(text) <= _MAX_LIMIT):
        raise InvalidInput(f"{where}: {option}={text[:64]!r} is no number from 1 on", where)
    return int(text)


def _seconds(text: str, where: str) -> float:
    """Of an ISO 8601 date or time; without a zone it is UTC."""
    try:
        when = datetime.datetime.fromisoformat(text)
        return (when.replace(tzinfo=datetime.UTC) if when.tzinfo is None else when).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{where}: expires={text[:64]!r} is no date like 2027-01-31 or 2027-01-31T12:00:00Z", where) from error
