"""``antiphon status``: pools, workers, leases and load, as a gateway sees them (control speed).

Must not know: how they are shown.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated

import typer

from antiphon.cli.serving.connection import DEFAULT, IS_IT_RUNNING, ApiKey, CaFile, Endpoint, connect
from antiphon.client import Client, ServiceStatus
from antiphon.core.errors import AntiphonError, Unavailable

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_PIPE_WIDTH = 220  # columns where nobody's terminal says how many there are


@app.command()
def status(
    endpoint: Endpoint = DEFAULT,
    deployment: Annotated[str, typer.Option("--deployment", "-d", help="Only this deployment.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch one line each time.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show again and again until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks with --watch.")] = 2.0,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Show pools and workers: role, state, shard, epoch, lease, queue, KV usage, work done, address."""
    with connect(endpoint, api_key, ca_file, max_attempts=1 if watch else 3) as client:
        if not watch:
            _show(client.status(deployment), as_json)
            return
        try:
            _watch(client, endpoint, deployment, as_json, interval_s)
        except KeyboardInterrupt:
            return


def _show(found: ServiceStatus, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    from rich.console import Console

    from antiphon.cli.serving.status_table import render

    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(render(found))


def _watch(client: Client, endpoint: str, deployment: str, as_json: bool, interval_s: float) -> None:
    """Look for ever. A gateway that is away is shown as such, and looked for again."""
    if as_json:
        while True:
            print(json.dumps(_look(client, deployment)), flush=True)
            time.sleep(interval_s)
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

    from antiphon.cli.serving.status_table import render

    def frame() -> RenderableType:
        try:
            return render(client.status(deployment))
        except Unavailable as error:
            return Text(f"error: {error}; {IS_IT_RUNNING}", style="red")
        except AntiphonError as error:
            return Text(f"error: {error}", style="red")

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    with Live(frame(), console=console, auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            time.sleep(interval_s)
            live.update(frame(), refresh=True)


def _look(client: Client, deployment: str) -> dict[str, object]:
    try:
        return dataclasses.asdict(client.status(deployment))
    except AntiphonError as error:
        return {"error": {"code": error.code, "message": str(error)}}
