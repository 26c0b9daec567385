"""``antiphon plan calibrate`` (control speed)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from antiphon.cli.plan.options import AsJson, HardwareFile, catalogue
from antiphon.cli.plan.show import show, tell
from antiphon.core.errors import InvalidInput


def calibrate(
    file: Annotated[Path, typer.Option("--input", "-i", help="JSON lines written by antiphon bench.")],
    hold_out: Annotated[str, typer.Option("--hold-out", help="Batch sizes to predict without having seen them.")] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="What was measured: name in the library, or path to a config.json.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="Where it was measured; none or 'local' measures this machine.")
    ] = None,
    hardware_file: HardwareFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the fitted shares for 'deploy --efficiency-file'; needs --model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit stage and step times to measurements, and hold predictions against them; with --model, the planner's shares too."""
    from antiphon.planner.calibration.fit import calibrate as run
    from antiphon.planner.calibration.fit import read_measurements
    from antiphon.planner.report.as_json import accelerator_json, calibration_json
    from antiphon.planner.report.tables import comparison_table, scatter_lines, share_lines

    try:
        held_out = frozenset(int(batch) for batch in hold_out.split(",") if batch.strip())
    except ValueError:
        raise InvalidInput(f"--hold-out {hold_out!r} is no list of batch sizes such as 1,8,32,64", "hold_out") from None
    measurements = read_measurements(file)
    batches = {one.batch for one in measurements}
    if not held_out <= batches:
        raise InvalidInput(
            f"hold_out: {_listed(held_out - batches)} was not measured; batch sizes are {_listed(batches)}", "hold_out"
        )
    fitted, comparisons = run(measurements, held_out)
    shares, errors, card = None, [], None
    if model is not None:
        from antiphon.planner.calibration.shares import fit_shares, stage_errors
        from antiphon.planner.cost.local_machine import measure_local
        from antiphon.planner.question import LOCAL, resolve_model

        known, shape, seen = catalogue(hardware_file), resolve_model(model), [p for p in measurements if p.batch not in held_out]
        key = hardware or LOCAL
        card = measure_local() if key == LOCAL and LOCAL not in known.accelerators else known.get(key)
        shares = fit_shares(seen, shape, card)
        errors = stage_errors(seen, shape, card, shares)
    else:
        for name, given in (("output", output), ("hardware", hardware), ("hardware_file", hardware_file)):
            if given is not None:
                raise InvalidInput(f"{name}: needs model; shares of the peaks follow from its operations and bytes", "model")
    if as_json:
        value = calibration_json(fitted, comparisons) | {"efficiency": shares, "stage_errors": errors}
        print(json.dumps(value, indent=2))
    else:
        show([comparison_table(comparisons)])
        tell([*scatter_lines(comparisons), *([] if shares is None else share_lines(shares, errors))])
    if output is not None:
        try:
            # The peaks too: shares of a machine that is measured anew each time would be shares of something else.
            own = {} if card is None or card.key in catalogue(None).accelerators else accelerator_json(card)
            peaks = {own.pop("key"): own} if own else {}
            output.write_text(json.dumps({"efficiency": shares, "hardware": peaks}, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"output: {output}: can't be written: {getattr(error, 'strerror', error)}", "output") from error


def _listed(batches: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(batches)))
