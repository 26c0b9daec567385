"""The options by which verbs reach a running gateway (control speed). Must not know: what they ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antiphon.client import Client, RetryPolicy, Tls
from antiphon.client.settings import DEFAULT_ENDPOINT
from antiphon.core.errors import InvalidInput

Endpoint = Annotated[
    str, typer.Option("--endpoint", "-e", envvar="ANTIPHON_ENDPOINT", help="host:port of the gateway's gRPC door.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="ANTIPHON_API_KEY", help="API key; better given by the environment.")
]
CaFile = Annotated[Path | None, typer.Option("--tls-ca", envvar="ANTIPHON_TLS_CA", help="PEM file of authorities: connect by TLS.")]
DEFAULT = DEFAULT_ENDPOINT
IS_IT_RUNNING = "is `antiphon serve` running?"


def connect(endpoint: str, api_key: str | None, ca_file: Path | None, *, max_attempts: int = 4) -> Client:
    """A client of the endpoint; it connects with its first call.

    Raises:
        InvalidInput: the authorities' file can't be read, or the key can't be sent.
    """
    tls = None
    if ca_file is not None:
        try:
            tls = Tls(root_certificates=ca_file.read_bytes())
        except OSError as error:
            raise InvalidInput(f"--tls-ca {ca_file} can't be read: {error.strerror}", "tls-ca") from error
    return Client(endpoint, api_key=api_key, tls=tls, retry=RetryPolicy(max_attempts=max_attempts))
