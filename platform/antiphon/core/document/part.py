"""Base of every part of a document: how it reads, refuses and freezes; and the metadata of every kind (control speed).

Must not know: any kind of document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

MAX_NAME_LENGTH = 40  # a RayService of the same name with its suffix must stay within 47 characters

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


class Model(BaseModel):
    """Base of all document parts: frozen, camelCase outside, unknown keys refused, types not coerced from strings."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        frozen=True,
        strict=True,
    )


class FieldsError(ValueError):
    """What a check over a whole part found: wrong fields, each with its path from that part as documents write it."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))
        self.problems = tuple(problems)


def check_dns_label(name: str) -> None:
    """Raises ValueError where ``name`` is none."""
    if not _DNS_LABEL.fullmatch(name):
        raise ValueError("must be a DNS label: lower-case letters, digits and '-', starting with a letter")


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that a document carries; the rest of ObjectMeta is accepted and ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = Field(description="Name of the deployment; a DNS label.", min_length=1, max_length=MAX_NAME_LENGTH)
    namespace: str | None = Field(default=None, description="Namespace; None = the current one.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations.")

    @field_validator("name")
    @classmethod
    def _is_dns_label(cls, name: str) -> str:
        check_dns_label(name)
        return name


def as_tuple(value: object) -> object:
    """A list of YAML as the tuple that it stands for."""
    return tuple(value) if isinstance(value, list) else value
