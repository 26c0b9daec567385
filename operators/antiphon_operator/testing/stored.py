"""What an API server keeps of an object, who owns which of its fields, and how objects are found (control speed).

Must not know: requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from antiphon_operator.kube.base import Labels, Object
from antiphon_operator.kube.resources import Resource
from antiphon_operator.testing.field_sets import Path
from antiphon_operator.testing.json_values import copied

Key = tuple[str, str, str]  # plural.group, namespace or "", name


@dataclass(slots=True)
class Owner:
    """One manager's fields of an object."""

    manager: str
    operation: Literal["Apply", "Update"]
    subresource: str
    fields: frozenset[Path]
    time: str


@dataclass(slots=True)
class Stored:
    """An object and who owns what of it."""

    value: Object
    owners: list[Owner] = field(default_factory=list)

    def copied(self) -> Stored:
        """A copy that shares nothing that changes."""
        return Stored(value=copied(self.value), owners=[replace(owner) for owner in self.owners])


def kind_of(resource: Resource) -> str:
    """A kind's name among all."""
    return f"{resource.plural}.{resource.group}"


def key_of(resource: Resource, namespace: str | None, name: str) -> Key:
    """An object's name among all."""
    return kind_of(resource), namespace or "", name


def is_in(value: Object, namespace: str | None) -> bool:
    """Whether the object is in the namespace; None = any."""
    return namespace is None or value["metadata"].get("namespace") == namespace


def matches(value: Object, labels: Labels | None) -> bool:
    """Whether the object has the labels; a set of values = one of them."""
    present = value["metadata"].get("labels", {})
    return all(
        present.get(key) == wanted if isinstance(wanted, str) else present.get(key) in wanted
        for key, wanted in (labels or {}).items()
    )
