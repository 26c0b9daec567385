"""Base of every part of a document: how it reads, refuses and freezes (control speed).

Must not know: any kind of document.
"""

from __future__ import annotations

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
