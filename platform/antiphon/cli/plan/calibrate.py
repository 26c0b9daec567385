"""``antiphon plan calibrate`` (control speed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from antiphon.cli.plan.options import AsJson, HardwareFile, catalogue
from antiphon.cli.plan.show import show
from antiphon.core.errors import InvalidInput


def calibrate(
    file: Annotated[Path, typer.Option("--input", "-i", help="JSON lines written by antiphon bench.")],
    hold_out: Annotated[str, typer.Option("--hold-out", help="Batch sizes to predict without having seen them.")] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="What was measured: name in the library, or path to a config.json.")
    ] = None,
    hardware: Annotated[str, typer.Option("--hardware", help="Where it was measured; 'local' measures this machine.")] = "local",
    hardware_file: HardwareFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the fitted shares for 'deploy --efficiency-file'; needs --model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit stage and step times to measurements, and hold predictions against them; with --model, the planner's shares too."""
    from antiphon.planner.calibration.fit import calibrate as run
    from antiphon.planner.calibration.fit import read_measurements
    from antiphon.planner.report.as_json import calibration_json
    from antiphon.planner.report.tables import comparison_table

    try:
        held_out = frozenset(int(batch) for batch in hold_out.split(",") if batch.strip())
    except ValueError:
        raise InvalidInput(f"--hold-out {hold_out!r} is no list of batch sizes such as 1,8,32,64", "hold_out") from None
    measurements = read_measurements(file)
    fitted, comparisons = run(measurements, held_out)
    shares = None
    if model is not None:
        from antiphon.planner.calibration.shares import fit_shares
        from antiphon.planner.cost.local_machine import measure_local
        from antiphon.planner.question import LOCAL, resolve_model

        known = catalogue(hardware_file)
        card = measure_local() if hardware == LOCAL and LOCAL not in known.accelerators else known.get(hardware)
        shares = fit_shares([one for one in measurements if one.batch not in held_out], resolve_model(model), card)
    elif output is not None:
        raise InvalidInput("--output needs --model: shares of the peaks follow from its operations and bytes", "model")
    if as_json:
        print(json.dumps(calibration_json(fitted, comparisons) | {"efficiency": shares}, indent=2))
    else:
        show([comparison_table(comparisons)])
        for name, value in (shares or {}).items():
            print(f"efficiency {name} = {value:.4g}")
    if output is not None:
        try:
            output.write_text(json.dumps({"efficiency": shares}, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"output: {output}: can't be written: {getattr(error, 'strerror', error)}", "output") from error
