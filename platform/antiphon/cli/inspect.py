"""``antiphon inspect``: what a model is made of, what each pool would hold, and how its experts were loaded (control speed).

Must not know: how parameters are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.core.errors import InvalidInput

app = typer.Typer(add_completion=False)

_FORMATS = ("bfloat16", "float32")
_SHADES = " ░▒▓█"


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or uri, as in a document's model.uri.")],
    attention: Annotated[int, typer.Option(min=1, help="Attention workers of the topology to show.")] = 1,
    slices: Annotated[int, typer.Option(min=1, help="Slices of every FFN and expert (parallelism.tensor).")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts (parallelism.expert).")] = 1,
    placement: Annotated[Path | None, typer.Option(help="Placement file; default: experts in equal runs.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    load: Annotated[Path | None, typer.Option(help="Rows by layer and expert, as JSON, to show as a heat map.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the heat map here.")] = None,
) -> None:
    """Show a model's parameters by role, its KV bytes, and what each pool would hold."""
    from antiphon.core.ids import FFNShard
    from antiphon.models.checkpoint import Checkpoint
    from antiphon.models.families import describe
    from antiphon.models.inventory import ffn_shard_bytes, take_inventory
    from antiphon.models.placement import ExpertPlacement
    from antiphon.models.source import resolve

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
    table.add_row("active per token", f"{found.active_parameters:,}")
    table.add_row("KV per token", f"{found.kv_token_bytes:,} bytes ({dtype})")
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
    console.print(pools)
    if load is not None:
        rows = _read_load(load)
        console.print(_heat(rows))
        if png is not None:
            _draw(rows, png)
            console.print(f"wrote {png}")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _read_load(path: Path) -> Mapping[int, Sequence[int]]:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = {int(layer): [int(count) for count in counts] for layer, counts in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path}: not rows by layer and expert: {error}", "load") from error
    if not rows or not all(rows.values()):
        raise InvalidInput(f"{path}: holds no rows", "load")
    return dict(sorted(rows.items()))


def _heat(rows: Mapping[int, Sequence[int]]) -> Text:
    """One line a layer, one cell an expert, shaded by its share of the layer's hottest; behind it, hottest over mean."""
    lines = [Text("rows by layer and expert, each layer against its hottest", style="bold")]
    for layer, counts in rows.items():
        hottest = max(max(counts), 1)
        cells = "".join(_SHADES[min(len(_SHADES) - 1, -(-count * (len(_SHADES) - 1) // hottest))] for count in counts)
        mean = sum(counts) / len(counts)
        lines.append(Text(f"{layer:>4} │{cells}│ {max(counts) / mean if mean else 1.0:5.2f} x mean"))
    return Text("\n").join(lines)


def _draw(rows: Mapping[int, Sequence[int]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    width = max(len(counts) for counts in rows.values())
    shares = [
        [count * len(counts) / max(sum(counts), 1) for count in counts] + [float("nan")] * (width - len(counts))
        for counts in rows.values()
    ]
    figure, axes = plt.subplots(figsize=(max(6.0, width * 0.18), max(2.5, len(rows) * 0.22)))
    image = axes.imshow(shares, aspect="auto", cmap="magma", vmin=0.0)
    axes.set(xlabel="expert", ylabel="layer", title="Expert load by layer (rows over the layer's mean)")
    axes.set_yticks(range(len(rows)), [str(layer) for layer in rows])
    figure.colorbar(image, label="x mean")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
