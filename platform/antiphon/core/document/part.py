"""Base of every part of a document: how it reads, refuses and freezes; and the metadata of every kind (control speed).

Must not know: any kind of document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

# Who deploys a document names its revision by this annotation; the parts of the deployment tell it on.
REVISION_ANNOTATION: Final = "serving.antiphon.dev/document-revision"

MAX_NAME_LENGTH = 40  # a RayService of the same name with its suffix must stay within 47 characters

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][-A-Za-z0-9_.]*")

# Expressions that Rust, Go and Python read alike: the API server checks the same ones.
_NO_CONTROL: Final = r"[^\x00-\x1f\x7f-\x9f]"
_NO_BLANK: Final = r"[^\x00-\x20\x7f-\xa0]"
LINE_REST: Final = f"{_NO_CONTROL}*{_NO_BLANK}"  # of a longer pattern: at least one character, and no blank at the end
LINE_PATTERN: Final = f"^{_NO_BLANK}({LINE_REST})?$"
PROSE_PATTERN: Final = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"
ENV_PATTERN: Final = r"^[^\x00]*$"
LABEL_PATTERN: Final = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"

# Line and paragraph separators, marks that turn the direction of text around, a byte order mark.
_OTHER_CONTROLS: Final = frozenset("\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
LINE_WORDS: Final = "text without control characters (line ends among them) and without blanks at its ends"


def _one_line(text: str) -> str:
    if text != text.strip() or not _OTHER_CONTROLS.isdisjoint(text):
        raise ValueError(f"expected {LINE_WORDS}")
    return text


OneLine = AfterValidator(_one_line)
Line = Annotated[str, Field(pattern=LINE_PATTERN), OneLine]
"""A name, an address, a path: it has something in it, no control characters, and no blanks at its ends."""

HeaderValue = Annotated[str, Field(pattern=f"^({_NO_BLANK}({LINE_REST})?)?$"), OneLine]
"""As a line, and may be empty."""

Prose = Annotated[str, Field(pattern=PROSE_PATTERN)]
"""Text for people: lines may end in it; other control characters may not stand in it."""

LabelValue = Annotated[str, Field(pattern=LABEL_PATTERN, max_length=63)]
"""The value of a label or a taint, as Kubernetes takes it; may be empty."""

EnvValue = Annotated[str, Field(pattern=ENV_PATTERN, max_length=32_768)]
"""What an environment variable can hold."""


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


def check_label_keys(labels: Mapping[str, str]) -> None:
    """Raises ValueError where a key is none that Kubernetes takes for a label."""
    for key in labels:
        if not _LABEL_KEY.fullmatch(key):
            raise ValueError(f"{key[:60]!r} is no key of a label: letters, digits, '-', '_' and '.', maybe after a domain and '/'")


def check_variables(env: Mapping[str, str]) -> None:
    """Raises ValueError where a key can't name an environment variable."""
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name[:60]!r} can't name an environment variable: letters, digits, '_', '-' and '.' can")


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that a document carries; the rest of ObjectMeta is accepted and ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = Field(description="Name of the deployment; a DNS label.", min_length=1, max_length=MAX_NAME_LENGTH)
    namespace: str | None = Field(default=None, description="Namespace; None = the current one.", min_length=1, max_length=63)
    labels: dict[str, LabelValue] = Field(default_factory=dict, description="Labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations.")

    @property
    def revision(self) -> str:
        """What whoever deployed this document calls its revision; "" = nobody said."""
        return self.annotations.get(REVISION_ANNOTATION, "")

    @field_validator("name")
    @classmethod
    def _is_dns_label(cls, name: str) -> str:
        check_dns_label(name)
        return name

    @field_validator("namespace")
    @classmethod
    def _is_namespace(cls, name: str | None) -> str | None:
        if name is not None and not _NAMESPACE.fullmatch(name):
            raise ValueError("must be a namespace: lower-case letters, digits and '-', starting and ending with a letter or digit")
        return name

    @field_validator("labels")
    @classmethod
    def _have_label_keys(cls, labels: Mapping[str, str]) -> Mapping[str, str]:
        check_label_keys(labels)
        return labels


def as_tuple(value: object) -> object:
    """A list of YAML as the tuple that it stands for."""
    return tuple(value) if isinstance(value, list) else value
