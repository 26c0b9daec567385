"""The key that makes processes parts of one deployment, and how a part proves to another that it has it (control speed).

Whoever starts a deployment makes the key; every process it starts gets it with its environment. There is no unproven way in: a
process that was given no key makes one, which nobody else has, and hands it to its own children.

    ANTIPHON_KEY_FILE   path of a file: one key a line; the first is used, all are accepted (to change keys one after the other).
                        Looked at again every second: new connections take the keys that it has then, open ones go on
    ANTIPHON_KEY        the same text itself

From a key are derived, each for its own purpose (HKDF, RFC 5869): proofs of the data plane's hello and of records (here), and the
certificates of gRPC connections (``rpc.credentials``). Must not know: what is proven to whom.
"""

from __future__ import annotations

import functools
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from antiphon.core.errors import InvalidInput

_log = logging.getLogger(__name__)

KEY_FILE_VARIABLE = "ANTIPHON_KEY_FILE"
KEY_VARIABLE = "ANTIPHON_KEY"

PROOF_BYTES = 32
LOOK_S = 1.0  # between two looks at the key file; a look is one stat
_MIN_KEY_CHARS = 32
_MAX_FILE_BYTES = 1 << 16
_SALT = b"antiphon deployment key 1"


@functools.lru_cache(maxsize=64)  # purposes are few, and one proves every event of a stream
def _derived(key: bytes, purpose: str) -> bytes:
    return hmac.digest(key, purpose.encode() + b"\x01", "sha256")


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
        return _derived(self.keys[key], purpose)

    def key_id(self, key: int = 0) -> bytes:
        """Eight bytes that name a key to those who have it, and say nothing about it."""
        return self.derive("name", key)[:8]

    def prove(self, purpose: str, *parts: bytes, key: int = 0) -> bytes:
        """A proof over ``parts`` that only who has the key can make."""
        return hmac.digest(self.derive(purpose, key), _framed(parts), "sha256")

    def prover(self, purpose: str, *parts: bytes, num_bytes: int) -> Callable[[bytes], bytes]:
        """``prove`` over ``parts`` and one more of ``num_bytes``, for who has many of those to prove."""
        secret, before = self.derive(purpose), _framed((*parts, bytes(num_bytes)))[:-num_bytes]
        return lambda last: hmac.digest(secret, before + last, "sha256")

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
_file: _KeyFile | None = None  # that _own is read from


def own_identity(environment: MutableMapping[str, str] = os.environ) -> Identity:
    """This process' keys now: from its environment, else made and put there for its children. Ask whenever they are needed: while
    they are the same, so is the value; a file that holds no keys any more leaves them as they were.

    Raises:
        InvalidInput: at the first time, the file can't be read, or holds no key.
    """
    global _own
    with _lock:
        if _own is None:
            _own = _read(environment)
        elif _file is not None and (changed := _file.look()) is not None and changed != _own:
            _own = changed
            _log.info("new connections prove themselves with the keys that %s has now", _file.path)
        return _own


class _KeyFile:
    """A key file that may change: an editor's by its inode, a mounted Secret by its link's target. Used under ``_lock``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(path)
        self._looked_s = time.monotonic()

    def look(self) -> Identity | None:
        """The keys when the file has changed since the last look, which is a second ago."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S:
            return None
        self._looked_s = now_s
        stamp = _stamp(self.path)
        if stamp == self._stamp or (stamp is not None and 0 <= time.time() - stamp[0] / 1e9 < LOOK_S / 2):
            return None  # the same, or written a moment ago and perhaps half of it: half a key is another one
        self._stamp = stamp
        try:
            return Identity.parse(_read_file(self.path))
        except InvalidInput as error:
            _log.warning("the deployment's keys stay as they are: %s", error)
            return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def adopt(text: str, environment: MutableMapping[str, str] = os.environ) -> Identity:
    """Make ``text`` this process' keys from now on, and its children's. What is open already stays as it is."""
    global _own, _file
    identity = Identity.parse(text)
    with _lock:
        _file = None
        environment.pop(KEY_FILE_VARIABLE, None)
        environment[KEY_VARIABLE] = text
        _own = identity
    return identity


def adopt_file(path: Path, environment: MutableMapping[str, str] = os.environ) -> Identity:
    """The same for the keys in a file, which the environment only names."""
    global _own, _file
    watched = _KeyFile(path)
    identity = Identity.parse(_read_file(path))
    with _lock:
        _file = watched
        environment.pop(KEY_VARIABLE, None)
        environment[KEY_FILE_VARIABLE] = str(path)
        _own = identity
    return identity


def forget_file(path: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """The keys of ``path`` are this process' no longer, if they were."""
    global _own, _file
    with _lock:
        if environment.get(KEY_FILE_VARIABLE) == str(path):
            del environment[KEY_FILE_VARIABLE]
            _own = _file = None


def is_given(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether whoever started this process gave it keys."""
    return bool(environment.get(KEY_FILE_VARIABLE) or environment.get(KEY_VARIABLE))


def _read(environment: MutableMapping[str, str]) -> Identity:
    global _file
    if path := environment.get(KEY_FILE_VARIABLE):
        _file = _KeyFile(Path(path))  # its stamp first: what changes while it is read is seen at the next look
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
