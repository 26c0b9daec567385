"""Connections to a store that a document names: none to a host that nothing of ours goes to (control speed).

The peer of each connection is looked at, before TLS and before a byte is sent; those that a redirect leads to, too. Must not know:
what is fetched.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from antiphon.core.text.addresses import check_host

_TIMEOUT_S: Final = 300.0
_RETRIES: Final = urllib3.Retry(total=5, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])


def open_pool() -> urllib3.PoolManager:
    """As minio makes its own."""
    bundle = os.environ.get("SSL_CERT_FILE") or certifi.where()
    pool = urllib3.PoolManager(timeout=_TIMEOUT_S, maxsize=10, cert_reqs="CERT_REQUIRED", ca_certs=bundle, retries=_RETRIES)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return pool


def _checked(connection: HTTPConnection, sock: socket.socket) -> socket.socket:
    try:
        check_host(str(sock.getpeername()[0]))
    except ValueError as error:
        sock.close()
        raise NewConnectionError(connection, str(error)) from None
    return sock


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _checked(self, super()._new_conn())


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _checked(self, super()._new_conn())


class _Pool(HTTPConnectionPool):
    ConnectionCls: Any = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls: Any = _TlsConnection
