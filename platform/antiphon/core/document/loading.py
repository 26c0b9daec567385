"""Documents: YAML files of one or several kinds, read into their typed models or refused with every problem (control speed).

``KINDS`` is the list of kinds; a new one is one line there. Must not know: what any document is used for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from antiphon.core.document.artifact import ModelArtifact
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.part import Metadata, Model
from antiphon.core.document.pools import ServingPool
from antiphon.core.document.problems import findings, shown, suggestion
from antiphon.core.document.spec import API_VERSION, LLMDeployment
from antiphon.core.document.yaml import YamlDocument, load_yaml, path_text
from antiphon.core.errors import Problem, SpecInvalid

_PART = re.compile(r"\[[0-9]+\]|[A-Za-z_][A-Za-z0-9_-]*")  # of a path that ``path_text`` wrote


class Document(Protocol):
    """What every kind has; ``isinstance`` with the kind's model gives the rest."""

    @property
    def kind(self) -> str:
        """The kind's name."""
        ...

    @property
    def metadata(self) -> Metadata:
        """Name, namespace, labels and annotations."""
        ...


Kind = type[LLMDeployment] | type[CompositionOfExperts] | type[ModelArtifact] | type[ServingPool]

KINDS: Mapping[str, Kind] = {
    "LLMDeployment": LLMDeployment,
    "CompositionOfExperts": CompositionOfExperts,
    "ModelArtifact": ModelArtifact,
    "ServingPool": ServingPool,
}


def read_documents(path: Path | str) -> list[Document]:
    """Read a YAML file.

    Raises:
        SpecInvalid: the file can't be read, is not YAML, or holds wrong fields; all problems of all its documents are named.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecInvalid([Problem(path=str(path), message=f"can't be read: {reason}", source=str(path))]) from error
    return parse_documents(data, str(path))


def parse_documents(text: str | bytes, source: str) -> list[Document]:
    """Read YAML text with one or several documents; ``source`` is named in the problems.

    Raises:
        SpecInvalid: it is not YAML, holds no document, or holds wrong fields; all problems of all its documents are named.
    """
    parts = load_yaml(text, source)
    if not parts:
        raise SpecInvalid([Problem(path="document", message="there is no document in the file", source=source)])
    found: list[Document] = []
    problems: list[Problem] = []
    for part in parts:
        try:
            found.append(_parse(part.value, source, part))
        except SpecInvalid as error:
            problems += error.problems
    if not problems:
        problems = _repeated(found, source)
    if problems:
        raise SpecInvalid(problems)
    return found


def parse_object(value: object, source: str) -> Document:
    """Check a document that is a plain value already, such as a custom resource; a ``status`` is left out.

    Raises:
        SpecInvalid: it holds wrong fields; all of them are named.
    """
    return _parse(value, source, None)


def placed(problems: Sequence[Problem], files: Sequence[Path]) -> list[Problem]:
    """The problems with file and line where those are not known yet and one of ``files`` has the field.

    A path may begin with whose it is: "LLMDeployment/name: spec.pools" or "name: spec.pools".
    """
    known: list[tuple[str, YamlDocument]] = []
    for file in files:
        try:
            known += [(str(file), part) for part in load_yaml(file.read_bytes(), str(file))]
        except (OSError, ValueError, SpecInvalid):  # whoever reads it says so
            continue
    return [problem if problem.line is not None else _placed(problem, known) for problem in problems]


def _placed(problem: Problem, known: Sequence[tuple[str, YamlDocument]]) -> Problem:
    whose, _, path = problem.path.rpartition(": ")
    parts = [int(part[1:-1]) if part[0] == "[" else part for part in _PART.findall(path)]
    kind, _, name = whose.rpartition("/")
    for source, part in known:
        value = part.value
        if not isinstance(value, dict) or (kind and value.get("kind") != kind):
            continue
        metadata = value.get("metadata")
        if name and not (isinstance(metadata, dict) and metadata.get("name") == name):
            continue
        if name or part.has(parts):
            return replace(problem, source=source, line=part.line(parts))
    return problem


def _parse(value: object, source: str, text: YamlDocument | None) -> Document:
    def problem(path: tuple[str | int, ...], message: str) -> Problem:
        line = None if text is None else text.line(path)
        return Problem(path=path_text(path) or "document", message=message, source=source, line=line)

    if not isinstance(value, Mapping):
        raise SpecInvalid([problem((), f"expected a mapping with apiVersion, kind, metadata and spec, got {shown(value)}")])
    problems = []
    if value.get("apiVersion") != API_VERSION:
        got = shown(value["apiVersion"]) if "apiVersion" in value else "none"
        problems.append(problem(("apiVersion",), f"expected {API_VERSION}, got {got}"))
    name = value.get("kind")
    model: type[Model] | None = KINDS.get(name) if isinstance(name, str) else None
    if model is None:
        near = f"; {suggestion(name, KINDS)}" if isinstance(name, str) else ""
        got = shown(name) if "kind" in value else "none"
        problems.append(problem(("kind",), f"expected one of {', '.join(KINDS)}, got {got}{near}"))
        raise SpecInvalid(problems)
    # What the cluster reports is no part of what people ask for, but stands in every document that kubectl prints.
    wanted = {**{key: part for key, part in value.items() if key != "status"}, "apiVersion": API_VERSION}
    try:
        document = model.model_validate(wanted, by_alias=True, by_name=False)
    except ValidationError as error:
        problems += [problem(found.path, found.message) for found in findings(error, model, wanted)]
        raise SpecInvalid(sorted(problems, key=lambda found: found.line or 0)) from error
    if problems:
        raise SpecInvalid(problems)
    assert isinstance(document, LLMDeployment | CompositionOfExperts | ModelArtifact | ServingPool)
    return document


def _repeated(documents: list[Document], source: str) -> list[Problem]:
    seen: set[tuple[str, str | None, str]] = set()
    problems = []
    for document in documents:
        identity = (document.kind, document.metadata.namespace, document.metadata.name)
        if identity in seen:
            message = f"{document.kind}/{document.metadata.name} is in the file twice"
            problems.append(Problem(path="metadata.name", message=message, source=source))
        seen.add(identity)
    return problems
