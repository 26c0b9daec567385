"""``antiphon experts``: how busy experts are, where they are, moving them, and which may be skipped (control speed).

    load       rows by layer and expert of a served model: a heat map, and JSON
    rebalance  move experts now, by their load or to the placement of a file
    placement  save the placement in use
    place      make a placement from a load file, without serving
    skip       search thresholds for skipping experts on a calibration file

Must not know: how experts are balanced, moved or skipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from antiphon.cli.models.heat import draw, heat, read_load
from antiphon.cli.serving.connection import DEFAULT, ApiKey, CaFile, Endpoint
from antiphon.core.errors import InvalidInput
from antiphon.rpc.client_channel import Tls
from antiphon.rpc.experts import ExpertsCalls, RebalanceWish

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Load of experts, their placement, and skipping.", rich_markup_mode=None
)

Deployment = Annotated[str, typer.Option("--deployment", "-d", help="Which deployment; default: the only one with experts.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or uri, as in a document's model.uri.")]


@app.command()
def load(
    endpoint: Endpoint = DEFAULT,
    deployment: Deployment = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the rows here, as antiphon inspect --load reads them.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the heat map here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a heat map.")] = False,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Show how many rows each expert of a served model had since its workers started."""
    with _Calls(endpoint, api_key, ca_file) as calls:
        found = calls.expert_load(deployment)
    body = {
        "deployment": found.deployment,
        "placement": found.placement_number,
        "rows": {str(layer): list(counts) for layer, counts in found.rows.items()},
    }
    if out is not None:
        out.write_text(json.dumps(body) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(body))
        return
    console = Console()
    if not found.rows:
        console.print(f"{found.deployment}: no worker that counts rows is there")
        return
    console.print(f"{found.deployment}, placement {found.placement_number}")
    console.print(heat(found.rows, console.width))
    if png is not None:
        draw(found.rows, png)
        console.print(f"wrote {png}")


@app.command()
def rebalance(
    endpoint: Endpoint = DEFAULT,
    deployment: Deployment = "",
    placement: Annotated[Path | None, typer.Option(help="Bring this placement file in; default: balance by the rows seen.")] = None,
    redundant: Annotated[
        int | None, typer.Option(min=0, help="Copies beyond the first, per layer; default: as the document says.")
    ] = None,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Move experts between the FFN workers of a served model now; requests go on meanwhile."""
    text = ""
    if placement is not None:
        try:
            text = placement.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{placement} can't be read: {error}", "placement") from error
    with _Calls(endpoint, api_key, ca_file) as calls:
        worker = calls.rebalance(RebalanceWish(deployment=deployment, placement_json=text, num_redundant=redundant))
    print(f"{worker} moves experts; antiphon experts load shows the number of the placement in use")


@app.command("placement")
def save_placement(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to; experts.placementFile of a document takes it.")],
    endpoint: Endpoint = DEFAULT,
    deployment: Deployment = "",
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Save the placement that a served model works by."""
    with _Calls(endpoint, api_key, ca_file) as calls:
        found = calls.expert_load(deployment)
    if not found.placement_json:
        raise InvalidInput(f"{found.deployment} does not spread experts over FFN workers", "deployment")
    out.write_text(found.placement_json + "\n", encoding="utf-8")
    print(f"wrote placement {found.placement_number} to {out}")


@app.command()
def place(
    model: Model,
    rows: Annotated[Path, typer.Option("--load", help="Rows by layer and expert, as antiphon experts load --out writes them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Placement file to write.")],
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts (parallelism.expert).")] = 2,
    redundant: Annotated[int, typer.Option(min=0, help="Copies beyond the first, per layer.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that the groups are spread over, in equal runs.")] = 1,
) -> None:
    """Balance experts by a load file and write the placement, without serving."""
    from antiphon.models.experts.balance import imbalance
    from antiphon.models.experts.placement import ExpertPlacement
    from antiphon.models.families import describe
    from antiphon.models.loading.checkpoint import Checkpoint
    from antiphon.models.loading.source import resolve

    with Checkpoint.open(Path(model) if Path(model).is_dir() else resolve(model, None)) as checkpoint:
        config = describe(checkpoint.config)
    loads = read_load(rows)
    before = ExpertPlacement.spread(config, groups)
    placement = ExpertPlacement.balanced(config, loads, groups, redundant, nodes)
    placement.save(out, config)
    for layer, counts in loads.items():
        if layer < len(placement.groups) and placement.groups[layer]:
            routed = counts[: len(placement.groups[layer])]
            was, now = imbalance(routed, before.groups[layer], groups), imbalance(routed, placement.groups[layer], groups)
            print(f"layer {layer}: busiest group {was:.2f} x mean in equal runs, {now:.2f} as placed")
    print(f"wrote {out}")


@app.command()
def skip(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="JSON lines, each with a text or messages or token_ids.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Thresholds file to write; experts.skipFile of a document takes it.")],
    allowed_rise: Annotated[float, typer.Option("--allow", min=0.0, help="Nats per token by which the loss may rise.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the calibration file to use, at most.")] = 20_000,
    max_len: Annotated[int, typer.Option(min=2, help="Tokens of one line to use, at most.")] = 512,
) -> None:
    """Search how many experts a model can skip for a stated loss, and write the thresholds."""
    from antiphon.apps.bench.calibration import CalibratedModel, read_calibration
    from antiphon.models.experts.skipping import ExpertSkipping, search
    from antiphon.models.loading.source import resolve

    directory = Path(model) if Path(model).is_dir() else resolve(model, None)
    texts = read_calibration(calibration, directory, max_tokens=max_tokens, max_len=max_len)
    measured = CalibratedModel(directory, texts, dtype=dtype)
    console = Console(stderr=True)
    console.print(f"{len(texts)} texts, {measured.num_predicted:,} tokens predicted")
    num_runs = 0

    def measure(skipping: ExpertSkipping | None) -> tuple[float, float]:
        nonlocal num_runs
        num_runs += 1
        loss, share = measured.measure(skipping)
        if sys.stderr.isatty():
            console.print(f"run {num_runs}: {loss:.4f} nats per token, {share:.1%} skipped")
        return loss, share

    found = search(measured.config, measure, allowed_rise)
    found.save(out, measured.config)
    print(
        f"threshold {found.threshold:.4g} skips {found.skipped_share:.1%} of routed experts for {found.loss_rise:+.4f}"
        f" nats per token (allowed {allowed_rise:g}); wrote {out}"
    )


class _Calls(ExpertsCalls):
    """A gateway's Experts service, with the key and authorities that the options give."""

    def __init__(self, endpoint: str, api_key: str | None, ca_file: Path | None) -> None:
        tls = None
        if ca_file is not None:
            try:
                tls = Tls(root_certificates=ca_file.read_bytes())
            except OSError as error:
                raise InvalidInput(f"--tls-ca {ca_file} can't be read: {error.strerror}", "tls-ca") from error
        metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        super().__init__(endpoint, tls=tls, metadata=metadata, timeout_s=15.0)

    def __enter__(self) -> _Calls:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
