"""``antiphon plan calibrate`` (control speed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from antiphon.cli.plan.options import AsJson
from antiphon.cli.plan.show import show
from antiphon.core.errors import InvalidInput


def calibrate(
    file: Annotated[Path, typer.Option("--input", "-i", help="JSON lines written by antiphon bench.")],
    hold_out: Annotated[str, typer.Option("--hold-out", help="Batch sizes to predict without having seen them.")] = "",
    as_json: AsJson = False,
) -> None:
    """Fit stage and step times to measurements, and hold predictions against them."""
    from antiphon.planner.calibration.fit import calibrate as run
    from antiphon.planner.calibration.fit import read_measurements
    from antiphon.planner.report.as_json import calibration_json
    from antiphon.planner.report.tables import comparison_table

    try:
        held_out = frozenset(int(batch) for batch in hold_out.split(",") if batch.strip())
    except ValueError:
        raise InvalidInput(f"--hold-out {hold_out!r} is no list of batch sizes such as 1,8,32,64", "hold_out") from None
    fitted, comparisons = run(read_measurements(file), held_out)
    if as_json:
        print(json.dumps(calibration_json(fitted, comparisons), indent=2))
    else:
        show([comparison_table(comparisons)])
