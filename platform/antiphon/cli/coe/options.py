"""What the verbs of ``antiphon coe`` share: options, and how they print (control speed). Must not know: any verb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from antiphon.core.document.composition import Policy

PLAIN_WIDTH = 160  # where the output is no terminal


class PolicyName(StrEnum):
    """Policies that an artifact knows."""

    QUALITY = "quality"
    BALANCED = "balanced"
    CHEAP = "cheap"

    @property
    def policy(self) -> Policy:
        """The document's word for it."""
        return self.value


ArtifactDir = Annotated[Path, typer.Option("--artifact", help="Directory of the router artifact.")]


def say(message: str) -> None:
    """Beside the output proper."""
    click.echo(message, err=True)


def to_json_text(value: dict[str, Any]) -> str:
    """Figures as JSON, keys sorted."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False)


def print_table(title: str | None, rows: Sequence[tuple[str, ...]], *, head: bool = False) -> None:
    """Rows as columns; ``head``: the first names them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    shown = RichTable(title=title, title_justify="left", show_header=head, header_style="bold", box=None, pad_edge=False)
    if head:
        for name in rows[0]:
            shown.add_column(escape(name))
    for row in rows[1:] if head else rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
