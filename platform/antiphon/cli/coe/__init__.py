"""``antiphon coe``: train, evaluate, try and serve a composition-of-experts router (control speed).

Must not know: how any of it is done.
"""

from __future__ import annotations

import typer

from antiphon.cli.coe.serving import demo, route, serve
from antiphon.cli.coe.training import add_expert, calibrate, evaluate, example, replay, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Composition of experts: train, evaluate, route, serve, demo.",
    rich_markup_mode=None,
)
app.command()(train)
app.command()(evaluate)
app.command()(route)
app.command("add-expert")(add_expert)
app.command()(calibrate)
app.command()(replay)
app.command()(serve)
app.command()(demo)
app.command("example-table")(example)
