"""``antiphon init``: a commented document for a model (control speed). Must not know: how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antiphon.cli.serving.quick_document import Wishes, document_text
from antiphon.core.document.loading import parse_documents
from antiphon.core.document.spec import Topology
from antiphon.core.errors import InvalidInput

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="hf://org/name, org/name, a directory or a .gguf file.")] = _DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; must not exist.")] = Path("antiphon.yaml"),
    topology: Annotated[Topology, typer.Option(help="How the model is split over pools.")] = Topology.MONOLITH,
) -> None:
    """Write a document for a model, with a comment where there is a choice."""
    text = document_text(model, Wishes(topology=topology))
    parse_documents(text, str(out))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InvalidInput(f"{out} is there already: --out names another", "out") from None
    except OSError as error:
        raise InvalidInput(f"{out}: {error.strerror}", "out") from error
    print(f"wrote {out}; antiphon serve {out} serves it")
