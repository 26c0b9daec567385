"""The key that makes processes parts of one deployment, and how a part proves to another that it has it (control speed).

Whoever starts a deployment makes the key; every process it starts gets it with its environment. There is no unproven way in: a
process that was given no key makes one, which nobody else has, and hands it to its own children.

    ANTIPHON_KEY_FILE   path of a file: one key a line; the first is used, all are accepted (to change keys one after the other)
    ANTIPHON_KEY        the same text itself

From a key are derived, each for its own purpose (HKDF, RFC 5869): proofs of the data plane's hello and of records (here), and the
certificates of gRPC connections (``rpc.credentials``). Must not know: what is proven to whom.
"""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from antiphon.core.errors import InvalidInput

KEY_FILE_VARIABLE = "ANTIPHON_KEY_FILE"
KEY_VARIABLE = "ANTIPHON_KEY"

PROOF_BYTES = 32
_MIN_KEY_CHARS = 32
_MAX_FILE_BYTES = 1 << 16
_SALT = b"antiphon deployment key 1"


@dataclass(frozen=True, slots=True)
class Identity:
    """The keys of one deployment. ``repr`` shows none of them."""

    keys: tuple[bytes, ...] = field(repr=False)  # the first proves, all are accepted
    given: bool = True  # False: made by this process for itself and its children

    @classmethod
    def parse(cls, text: str) -> Identity:
        """The keys of ``text``, one a line.

        Raises:
            InvalidInput: there is none, or one is shorter than 32 characters.
        """
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or any(len(line) < _MIN_KEY_CHARS for line in lines):
            raise InvalidInput(f"a deployment's key has at least {_MIN_KEY_CHARS} characters", KEY_FILE_VARIABLE)
        return cls(tuple(hmac.digest(_SALT, line.encode(), "sha256") for line in lines))

    def derive(self, purpose: str, key: int = 0) -> bytes:
        """32 bytes for one purpose, which tell nothing about those of another."""
        return hmac.digest(self.keys[key], purpose.encode() + b"\x01", "sha256")

    def key_id(self, key: int = 0) -> bytes:
        """Eight bytes that name a key to those who have it, and say nothing about it."""
        return self.derive("name", key)[:8]

    def prove(self, purpose: str, *parts: bytes, key: int = 0) -> bytes:
        """A proof over ``parts`` that only who has the key can make."""
        return hmac.digest(self.derive(purpose, key), _framed(parts), "sha256")

    def is_proof(self, proof: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether ``proof`` was made over ``parts`` with one of the keys; takes as long whether it was or not."""
        found = False
        for key in range(len(self.keys)):
            found |= hmac.compare_digest(proof, self.prove(purpose, *parts, key=key))
        return found


def new_key() -> str:
    """A new key, as a line of a key file."""
    return secrets.token_hex(32)


_lock = threading.Lock()
_own: Identity | None = None


def own_identity(environment: MutableMapping[str, str] = os.environ) -> Identity:
    """This process' keys: from its environment, else made now and put there for its children; read once.

    Raises:
        InvalidInput: the file can't be read, or holds no key.
    """
    global _own
    with _lock:
        if _own is None:
            _own = _read(environment)
        return _own


def adopt(text: str, environment: MutableMapping[str, str] = os.environ) -> Identity:
    """Make ``text`` this process' keys from now on, and its children's. What is open already stays as it is."""
    global _own
    identity = Identity.parse(text)
    with _lock:
        environment.pop(KEY_FILE_VARIABLE, None)
        environment[KEY_VARIABLE] = text
        _own = identity
    return identity


def adopt_file(path: Path, environment: MutableMapping[str, str] = os.environ) -> Identity:
    """The same for the keys in a file, which the environment only names."""
    global _own
    identity = Identity.parse(_read_file(path))
    with _lock:
        environment.pop(KEY_VARIABLE, None)
        environment[KEY_FILE_VARIABLE] = str(path)
        _own = identity
    return identity


def forget_file(path: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """The keys of ``path`` are this process' no longer, if they were."""
    global _own
    with _lock:
        if environment.get(KEY_FILE_VARIABLE) == str(path):
            del environment[KEY_FILE_VARIABLE]
            _own = None


def is_given(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether whoever started this process gave it keys."""
    return bool(environment.get(KEY_FILE_VARIABLE) or environment.get(KEY_VARIABLE))


def _read(environment: MutableMapping[str, str]) -> Identity:
    if path := environment.get(KEY_FILE_VARIABLE):
        return Identity.parse(_read_file(Path(path)))
    if text := environment.get(KEY_VARIABLE):
        return Identity.parse(text)
    text = environment[KEY_VARIABLE] = new_key()
    return Identity(Identity.parse(text).keys, given=False)


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the deployment's key can't be read: {error}", KEY_FILE_VARIABLE) from error


def _framed(parts: tuple[bytes, ...]) -> bytes:
    """Parts so that no two different tuples look alike."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
