"""``antiphon examples`` and ``antiphon init``: documents to begin with (control speed).

Must not know: what a document asks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antiphon.core.document.problems import suggestion
from antiphon.core.errors import InvalidInput

examples_app = typer.Typer(add_completion=False, rich_markup_mode=None)


def examples_directory() -> Path:
    """Where the example documents are: in the package once installed, beside the sources in a clone."""
    installed = Path(__file__).parents[1] / "examples"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "deploy" / "examples"


def example(name: str) -> Path:
    """The file of an example.

    Raises:
        InvalidInput: there is none of that name.
    """
    found = {path.stem: path for path in examples_directory().glob("*.yaml")}
    stem = name.removesuffix(".yaml")
    if stem not in found:
        raise InvalidInput(f"there is no example {name!r}; {suggestion(stem, found)}", "name")
    return found[stem]


def about(path: Path) -> str:
    """An example's first comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


@examples_app.command()
def examples(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one; without, list all.")] = None,
) -> None:
    """List the example documents, or print one; antiphon serve takes its name with .yaml left out."""
    if name is not None:
        print(example(name).read_text(encoding="utf-8"), end="")
        return
    paths = sorted(examples_directory().glob("*.yaml"))
    width = max((len(path.stem) for path in paths), default=0)
    for path in paths:
        print(f"{path.stem:<{width}}  {about(path)}")
    print("\nantiphon examples NAME > model.yaml, then antiphon serve model.yaml")


app = examples_app
