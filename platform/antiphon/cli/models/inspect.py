"""``antiphon inspect``: what a model is made of, what each pool would hold, and how its experts were loaded (control speed).

Must not know: how parameters are counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from antiphon.cli.models.heat import draw, heat, read_load
from antiphon.core.errors import InvalidInput
from antiphon.core.kv import LIVE_STATES

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_FORMATS = ("bfloat16", "float32")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or uri, as in a document's model.uri.")],
    attention: Annotated[int, typer.Option(min=1, help="Attention workers of the topology to show.")] = 1,
    slices: Annotated[int, typer.Option(min=1, help="Slices of every FFN and expert (parallelism.tensor).")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts (parallelism.expert).")] = 1,
    placement: Annotated[Path | None, typer.Option(help="Placement file; default: experts in equal runs.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    load: Annotated[
        Path | None, typer.Option(help="Show a heat map of expert load: a file from antiphon experts load --out.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the heat map here.")] = None,
) -> None:
    """Show a model's parameters by role, its KV bytes, and what each pool would hold."""
    from antiphon.core.ids import FFNShard
    from antiphon.gateway.text.checkpoint_texts import read_sampling_defaults
    from antiphon.models.experts.placement import ExpertPlacement
    from antiphon.models.families import describe
    from antiphon.models.loading.checkpoint import Checkpoint
    from antiphon.models.loading.inventory import ffn_shard_bytes, take_inventory
    from antiphon.models.loading.source import resolve

    if dtype not in _FORMATS:
        raise InvalidInput(f"dtype {dtype!r}, expected one of {', '.join(_FORMATS)}", "dtype")
    if png is not None and load is None:
        raise InvalidInput("--png draws what --load holds; give both", "load")
    directory = Path(model) if Path(model).is_dir() else resolve(model, None)
    console = Console()
    with Checkpoint.open(directory) as checkpoint:
        config = describe(checkpoint.config)
        found = take_inventory(config, checkpoint, dtype)
    itemsize = found.itemsize_bytes
    table = Table(title=str(directory), title_justify="left", show_header=False, box=None)
    table.add_row("family", found.family)
    sparse = f", {found.num_sparse_layers} with {found.experts_per_row} of {found.num_experts} experts" if found.num_experts else ""
    table.add_row("layers", f"{found.num_layers}{sparse}")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("  attention side", f"{found.attention_parameters:,}")
    for label, count in (
        ("  dense FFNs", found.dense_ffn_parameters),
        ("  routed experts", found.expert_parameters),
        ("  shared experts", found.shared_parameters),
    ):
        if count:
            table.add_row(label, f"{count:,}")
    if found.prediction_parameters:
        table.add_row("multi-token prediction", f"{found.prediction_parameters:,} more, which only drafts use")
    table.add_row("active per token", f"{found.active_parameters:,}")
    if found.kv_token_bytes:
        per_gib = 2**30 // found.kv_token_bytes
        table.add_row("KV per token", f"{found.kv_token_bytes:,} bytes ({dtype}); 1Gi holds {per_gib:,} tokens")
    if found.state_bytes:
        live = f"{LIVE_STATES} of them while it runs, whatever its length"
        table.add_row("state per sequence", f"{found.state_bytes:,} bytes; {live}")
    sampling = read_sampling_defaults(directory)
    shown = ", ".join(f"{name} {value:g}" for name, value in sampling.items()) or "none: OpenAI's"
    table.add_row("sampling defaults", shown)
    console.print(table)
    where = ExpertPlacement.spread(config, groups) if placement is None else ExpertPlacement.load(placement, config)
    if where.num_groups != groups:
        raise InvalidInput(f"{placement} has {where.num_groups} groups of experts, --groups says {groups}", "groups")
    pools = Table(title=f"{attention}A{slices * groups}F, {dtype}", title_justify="left", box=None)
    for column in ("worker", "holds", "weights"):
        pools.add_column(column, justify="right" if column == "weights" else "left")
    pools.add_row(
        f"attention x {attention}", "attention, embeddings, gates, head", _megabytes(found.attention_parameters * itemsize)
    )
    for index in range(slices * groups):
        shard = FFNShard.of(index, num_tensor=slices, num_expert=groups)
        part = f"slice {shard.tensor_index + 1}/{slices}, experts {shard.expert_index + 1}/{groups}"
        pools.add_row(f"ffn {index}", part, _megabytes(ffn_shard_bytes(config, shard, where, itemsize)))
    pools.add_row("prefill, decode, monolith", "whole layers, each worker", _megabytes(found.parameters * itemsize))
    console.print(pools)
    if load is not None:
        rows = read_load(load)
        console.print(heat(rows, console.width))
        if png is not None:
            draw(rows, png)
            console.print(f"wrote {png}")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
