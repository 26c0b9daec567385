"""``antiphon coe``: train, evaluate, try and serve a composition-of-experts router (control speed).

Must not know: how any of it is done.
"""

from __future__ import annotations

import typer

from antiphon.cli.coe.serving import demo, route, serve
from antiphon.cli.coe.training import add_expert, calibrate, evaluate, example, replay, train

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Composition of experts: train, evaluate, route, serve, demo.")
for verb in (train, evaluate, route):
    app.command()(verb)
app.command("add-expert")(add_expert)
for verb in (calibrate, replay, serve, demo):
    app.command()(verb)
app.command("example-table")(example)
