"""A certificate and its key in files that may change while doors use them (control speed).

    doors ask once a second ─► stamps differ ─► both files parse and belong together ─► new connections get them

Connections that are open keep what they were opened with. Must not know: which door.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from antiphon.core.errors import Unavailable

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
HANDSHAKE_S: Final = 10.0  # how long a client may take to shake hands
_MAX_BYTES: Final = 2**20

_Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where a door's certificate (with its chain) and private key lie, both PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    certificate: bytes
    key: bytes


class DoorCertificate:
    """The certificate of one door, as its files have it now. Any thread may ask.

    Args:
        files: Where it lies.
        clock: Monotonic seconds.

    Raises:
        Unavailable: a file can't be read, or they don't belong together.
    """

    def __init__(self, files: TlsFiles, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = clock()
        self._stamp: _Stamp | None = None
        self._told = ""
        try:
            self._stamp = self._stamped()
            self._pair = self._read()
        except (OSError, ValueError) as error:
            raise Unavailable(f"spec.endpoint.tls: {files.certificate}, {files.key}: {error}") from error
        self.number = 1  # of the pair; the next one has the next

    def look(self) -> int:
        """Look at the files when the last look is a second ago; the number of the pair that holds now."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._looked_s >= LOOK_S:
                self._looked_s = now_s
                self._take()
            return self.number

    def server_context(self) -> ssl.SSLContext:
        """For HTTP: TLS 1.2 and above. ``renew`` gives it a later pair."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self.renew(context)
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Let a context's new connections have the files' pair.

        Raises:
            OSError, ValueError: the files have changed since they were looked at, and are wrong now.
        """
        context.load_cert_chain(self._files.certificate, self._files.key)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For gRPC: each handshake takes the pair that holds then."""
        given = self.number

        def newer() -> Any:  # a configuration, or None: the one that was given last still holds
            nonlocal given
            number = self.look()
            if number == given:
                return None
            given = number
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(self._configuration(), newer, require_client_authentication=False)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = self._pair
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)])

    def _take(self) -> None:
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            pair = self._read()
            if self._stamped() != stamp:
                return  # still being written: the next look sees it whole
        except (OSError, ValueError) as error:
            if str(error) != self._told:
                _log.warning("the door's certificate stays as it is: %s: %s", self._files.certificate, error)
            self._told = str(error)
            return
        self._stamp, self._told = stamp, ""
        if pair != self._pair:
            self._pair = pair
            self.number += 1
            _log.info("new connections get the certificate that %s has now", self._files.certificate)

    def _stamped(self) -> _Stamp:
        found = [path.stat() for path in (self._files.certificate, self._files.key)]
        return tuple(number for each in found for number in (each.st_mtime_ns, each.st_ino, each.st_size))

    def _read(self) -> _Pair:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(  # raises where they don't belong together
            self._files.certificate, self._files.key, password=_no_password
        )
        return _Pair(certificate=_bytes(self._files.certificate), key=_bytes(self._files.key))


def own_door_context(certificate: Path) -> ssl.SSLContext:
    """For this deployment's own processes at its door: exactly its certificate is trusted, by whatever name it is reached."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def _no_password() -> str:
    raise ValueError("the private key is encrypted; give it without a password")


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES} bytes")
    return raw
