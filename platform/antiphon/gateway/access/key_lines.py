"""Lines of a key file: one hashed API key each, with its tenant, scope and expiry (values; control speed).

    team-a  user   sha256:9f86d0...  expires=2027-01-31
    ops     admin  sha256:60303a...              # a comment

Several lines of one tenant are its keys: the new one beside the old while keys are changed. The hash is plain SHA-256 of the key,
which is enough because keys are long and random, and lets anybody write a line with ``sha256sum``. Must not know: files.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final, Literal

from antiphon.core.errors import InvalidInput

Scope = Literal["user", "admin"]

MAX_KEYS: Final = 10_000
MIN_KEY_CHARS: Final = 20
_KEY_PREFIX: Final = "ak-"
_HASH_PREFIX: Final = "sha256:"
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HASH: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLine:
    """One accepted key."""

    tenant: str
    scope: Scope
    digest: bytes  # of the key, SHA-256
    expires_s: float | None = None  # seconds since 1970; None = never

    def __str__(self) -> str:
        words = [self.tenant, self.scope, _HASH_PREFIX + self.digest.hex()]
        if self.expires_s is not None:
            words.append(f"expires={datetime.datetime.fromtimestamp(self.expires_s, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}")
        return " ".join(words)


def new_key() -> str:
    """A key with 256 random bits."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_line(tenant: str, scope: str, key: str, expires: str | None = None) -> KeyLine:
    """The line of a key.

    Args:
        tenant: Whose it is.
        scope: user or admin.
        key: The key itself.
        expires: As in a line; None = never.

    Raises:
        InvalidInput: the name or the expiry can't be read, or the key is too short to be kept as a plain hash.
    """
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInput(f"a key has at least {MIN_KEY_CHARS} printable characters and no blanks; best a random one", "key")
    options = [] if expires is None else [f"expires={expires}"]
    return _line([tenant, scope, _HASH_PREFIX + digest_of(key).hex(), *options], "key")


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
        if not separator or name not in ("expires",) or name in given:
            raise InvalidInput(f"{where}: {option[:64]!r} is not expected; known: expires=<date>", where)
        given[name] = value
    return KeyLine(
        tenant=tenant,
        scope="admin" if scope == "admin" else "user",
        digest=bytes.fromhex(matched.group(1)),
        expires_s=_seconds(given["expires"], where) if "expires" in given else None,
    )


def _seconds(text: str, where: str) -> float:
    """Of an ISO 8601 date or time; without a zone it is UTC."""
    try:
        when = datetime.datetime.fromisoformat(text)
        return (when.replace(tzinfo=datetime.UTC) if when.tzinfo is None else when).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{where}: expires={text[:64]!r} is no date like 2027-01-31 or 2027-01-31T12:00:00Z", where) from error
