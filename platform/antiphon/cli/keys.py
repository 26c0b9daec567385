"""``antiphon keys``: make API keys and the hashed lines of a key file (control speed). Must not know: who reads the file."""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import click
import typer

from antiphon.core.errors import InvalidInput

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Tenant = Annotated[str, typer.Argument(help="Whose key it is; several keys may have one tenant.", show_default=False)]
ScopeOption = Annotated[str, typer.Option("--scope", help="user (ask models) or admin (status, experts and metrics, too).")]
Expires = Annotated[str | None, typer.Option("--expires", help="A date like 2027-01-31, or a time from now like 90d or 12h.")]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="Requests a minute that the tenant has.")]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens a minute, prompt and output together.")]
Streams = Annotated[int | None, typer.Option("--streams", min=1, help="Requests answered at once.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="Add the line to this file; running gateways see it.")]

_UNITS = {"d": 86_400, "h": 3600, "m": 60}


@app.command()
def new(
    tenant: Tenant,
    scope: ScopeOption = "user",
    expires: Expires = None,
    requests: Requests = None,
    tokens: Tokens = None,
    streams: Streams = None,
    file: File = None,
) -> None:
    """Make a random key. It is shown once; the line that is kept does not tell it."""
    from antiphon.core.budget import TenantLimits
    from antiphon.gateway.access.key_lines import key_line, new_key

    key = new_key()
    limits = TenantLimits(requests_per_min=requests, tokens_per_min=tokens, num_streams=streams)
    line = str(key_line(tenant, scope, key, None if expires is None else _moment(expires), limits))
    _write(line, file, f"key   {key}\n")


@app.command("hash")
def hash_key(tenant: Tenant, scope: ScopeOption = "user", expires: Expires = None, file: File = None) -> None:
    """Make the line of a key that you have; it is read from the standard input, so that no process list shows it."""
    key = click.prompt("key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    _write(_line(tenant, scope, key, expires), file, "")


@app.command("list")
def list_keys(file: Annotated[Path, typer.Argument(help="A key file.", show_default=False)]) -> None:
    """Check a key file, and list whose keys it has, how long they are good, and what their tenants may use."""
    from antiphon.gateway.access.key_lines import parse_lines

    try:
        lines = parse_lines(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} can't be read: {error}", "file") from error
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}", "file") from error
    now_s = time.time()
    for line in lines:
        until = "for ever"
        if line.expires_s is not None:
            day = datetime.datetime.fromtimestamp(line.expires_s, datetime.UTC)
            until = f"{'until' if now_s < line.expires_s else 'EXPIRED'} {day:%Y-%m-%d %H:%M} UTC"
        click.echo("  ".join([f"{line.tenant:24} {line.scope:6} {line.digest.hex()[:12]}", until, *line.limit_words]))


@app.command()
def usage(
    url: Annotated[str, typer.Argument(help="The gateway's HTTP door.")] = "http://127.0.0.1:8000",
    first: Annotated[str | None, typer.Option("--from", help="First day, like 2027-01-01; today where none is said (UTC).")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last day.")] = None,
    form: Annotated[str, typer.Option("--format", help="csv or json.")] = "csv",
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="ANTIPHON_API_KEY", help="A key of scope admin.")] = None,
    ca_file: Annotated[Path | None, typer.Option("--tls-ca", envvar="ANTIPHON_TLS_CA", help="PEM file of authorities.")] = None,
) -> None:
    """Print what tenants used of each model: requests, prompt, cached and output tokens by day."""
    import ssl

    import httpx

    from antiphon.core.errors import Unauthenticated, Unavailable

    asked = {name: value for name, value in (("from", first), ("to", last), ("format", form)) if value is not None}
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        trust: ssl.SSLContext | bool = True if ca_file is None else ssl.create_default_context(cafile=ca_file)
        answer = httpx.get(f"{url.rstrip('/')}/usage", params=asked, headers=headers, verify=trust, timeout=30.0)
    except httpx.ConnectError as error:
        refused = "Connection refused" in str(error)
        raise Unavailable(f"no connection to {url}: {'connection refused' if refused else error}") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise InvalidInput(f"{url} can't be asked: {error}", "url") from error
    if answer.is_success:
        click.echo(answer.text, nl=not answer.text.endswith("\n"))
        return
    try:
        why = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        why = f"status {answer.status_code}"
    raise (Unauthenticated if answer.status_code in (401, 403) else InvalidInput)(f"{url}: {why}")


def _line(tenant: str, scope: str, key: str, expires: str | None) -> str:
    from antiphon.gateway.access.key_lines import key_line

    return str(key_line(tenant, scope, key, None if expires is None else _moment(expires)))


def _moment(text: str) -> str:
    matched = re.fullmatch(r"(\d{1,5})([dhm])", text)
    if matched is None:
        return text
    seconds = int(matched.group(1)) * _UNITS[matched.group(2)]
    return f"{datetime.datetime.fromtimestamp(time.time() + seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _write(line: str, file: Path | None, told: str) -> None:
    if file is None:
        click.echo(f"{told}{'line  ' if told else ''}{line}")
        return
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(line + "\n")
    except OSError as error:
        raise InvalidInput(f"{file} can't be written: {error.strerror}", "file") from error
    click.echo(told, nl=False)
    click.echo(f"added to {file}", err=True)
