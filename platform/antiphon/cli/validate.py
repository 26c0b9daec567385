"""``antiphon validate``: check documents and name every wrong field (control speed). Must not know: what documents are used for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from antiphon.apps.serve.deployment_set import unknown_draft_models, unknown_references
from antiphon.cli.errors import problem_line
from antiphon.core.device import device_problems
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.loading import Document, placed, read_documents
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Problem, SpecInvalid
from antiphon.core.tiers import tier_problems

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def validate(
    files: Annotated[list[Path], typer.Option("--filename", "-f", help="YAML file; may be given several times.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Check documents: one line per problem, or "ok" and what they ask for. Exits with 1 when there is a problem."""
    documents: list[Document] = []
    sources: list[str] = []
    problems: list[Problem] = []
    for path in files:
        try:
            documents += read_documents(path)
        except SpecInvalid as error:
            problems += error.problems
        else:
            sources += [str(path)] * (len(documents) - len(sources))
    problems += _devices(documents, sources)
    problems += _misfits(documents, sources)
    problems = placed(problems, files)
    if as_json:
        found = {
            "ok": not problems,
            "documents": [{"kind": document.kind, "name": document.metadata.name} for document in documents],
            "problems": [dataclasses.asdict(problem) for problem in problems],
        }
        print(json.dumps(found, indent=2))
    else:
        for problem in problems:
            print(problem_line(problem))
        for document in documents:
            print(f"ok: {describe(document)}")
    if problems:
        raise typer.Exit(1)


def _devices(documents: list[Document], sources: list[str]) -> list[Problem]:
    """Cards asked for in ways that no worker can use, whatever the machine."""
    return [
        Problem(path=f"{document.kind}/{document.metadata.name}: spec.{path}", message=why, source=source)
        for document, source in zip(documents, sources, strict=True)
        if isinstance(document, LLMDeployment)
        for path, why in device_problems(document.spec)
    ]


def _misfits(documents: list[Document], sources: list[str]) -> list[Problem]:
    """Experts and draft models whose deployment is in none of the files, or experts that can't share memory as tiers ask.

    A call without deployments has nothing to compare with; one deployment alone may draft with another that is not shown.
    """
    deployments = [document for document in documents if isinstance(document, LLMDeployment)]
    if not deployments:
        return []
    return ([] if len(deployments) == 1 else unknown_draft_models(deployments)) + [
        dataclasses.replace(problem, source=source)
        for document, source in zip(documents, sources, strict=True)
        if isinstance(document, CompositionOfExperts)
        for problem in (*unknown_references(deployments, [document]), *tier_problems(deployments, [document]))
    ]


def describe(document: Document) -> str:
    """A document in one line: kind, name and, for a deployment, its topology and pools."""
    name = f"{document.kind}/{document.metadata.name}"
    if isinstance(document, CompositionOfExperts):
        spec = document.spec
        experts = ", ".join(expert.name for expert in spec.experts)
        return f"{name} (model {document.model_name}, general {spec.general}, policy {spec.policy.name}, experts {experts})"
    if not isinstance(document, LLMDeployment):
        return name
    pools = ", ".join(f"{pool.name} {pool.role} x{pool.replicas}" for pool in document.spec.pools)
    return f"{name} (topology {document.spec.topology.value}, pools {pools})"
