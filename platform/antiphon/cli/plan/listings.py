"""``antiphon plan hardware`` and ``antiphon plan models`` (control speed)."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from antiphon.cli.plan.options import AsJson, HardwareFile, catalogue
from antiphon.cli.plan.show import show, tell


def hardware(
    hardware_file: HardwareFile = None,
    local: Annotated[bool, typer.Option("--local", help="Measure this machine too, in a few seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """The accelerators that are known, with the source of each figure."""
    from antiphon.planner.cost.local_machine import measure_local
    from antiphon.planner.report.as_json import accelerator_json
    from antiphon.planner.report.tables import hardware_table, source_lines

    cards = list(catalogue(hardware_file).accelerators.values())
    if local:
        cards.append(measure_local())
    if as_json:
        print(json.dumps({card.key: accelerator_json(card) for card in cards}, indent=2))
    else:
        show([hardware_table(cards)])
        tell(source_lines([(card.key, card.title, card.source) for card in cards]))


def models(as_json: AsJson = False) -> None:
    """The models in the library."""
    from antiphon.planner.cost.library import find_model, model_names
    from antiphon.planner.report.as_json import models_json
    from antiphon.planner.report.tables import models_table, source_lines

    found = [find_model(name) for name in model_names()]
    if as_json:
        print(json.dumps(models_json(found), indent=2))
    else:
        show([models_table(found)])
        tell(source_lines([(model.name, model.title, model.source) for model in found]))
