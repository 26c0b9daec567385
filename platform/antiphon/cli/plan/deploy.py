"""``antiphon plan deploy`` (control speed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from antiphon.cli.plan.options import AsJson, CardOptions, Explain, PlanOptions, spread
from antiphon.cli.plan.show import show, tell
from antiphon.core.errors import InvalidInput


@spread
def deploy(
    asked: PlanOptions,
    cards: CardOptions,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with pictures to this file.")] = None,
    explain: Explain = False,
    as_json: AsJson = False,
) -> None:
    """What to run on which hardware, how many of each, and whether AFD pays. Exits with 1 when nothing is feasible."""
    from antiphon.planner.plan import explain as derive
    from antiphon.planner.plan import make_plan
    from antiphon.planner.report import html_report, tables
    from antiphon.planner.report.as_json import derivation_json, plan_json

    question = asked.question(cards)
    plan = make_plan(question.planner)
    if html is not None:
        page = html_report.report(plan, question.model, question.fleet, derive(plan))
        try:
            html.write_text(page, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"html: {html}: can't be written: {getattr(error, 'strerror', error)}", "html") from error
    if as_json:
        value = plan_json(plan)
        if explain:
            value["explanation"] = derivation_json(derive(plan))
        print(json.dumps(value, indent=2))
    else:
        tell([tables.traffic_line(question.planner.demand.traffic), tables.formats_line(question.planner.formats)])
        if plan.options:
            show([tables.roles_table(plan), tables.option_table(plan)])
        tell(tables.verdict_lines(plan))
        if explain:
            print("\n".join(tables.derivation_lines(derive(plan))))
    if plan.chosen is None:
        raise typer.Exit(1)
