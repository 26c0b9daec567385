"""Tables of text on a terminal (control speed).

Must not know: what the tables say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from antiphon.planner.report.tables import Table


def show(tables: Sequence[Table]) -> None:
    """Print them one below the other."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def tell(lines: Sequence[str]) -> None:
    """Print lines, wrapped at words."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False)
