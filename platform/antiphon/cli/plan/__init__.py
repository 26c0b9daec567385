"""``antiphon plan``: cost, deploy, simulate, calibrate, hardware, models (control speed).

Each verb parses, asks the planner, prints. Must not know: any formula.
"""

from __future__ import annotations

import typer

from antiphon.cli.plan.calibrate import calibrate
from antiphon.cli.plan.cost import cost
from antiphon.cli.plan.deploy import deploy
from antiphon.cli.plan.listings import hardware, models
from antiphon.cli.plan.simulate import simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
for verb in (cost, deploy, simulate, calibrate, hardware, models):
    app.command()(verb)
