"""Base of every part of a document: how it reads, refuses and freezes (control speed).

Must not know: any kind of document.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


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
