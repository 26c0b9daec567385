"""What is wrong with a document, said with the field's path, what was expected and what stands there (control speed).

pydantic finds the errors; this module puts them into our words, and into the paths that people wrote. A check over a whole
part names the fields it means in one of two ways: it raises ``FieldsError``, or a ValueError "field.path: message".

Must not know: any kind of document, or YAML.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from antiphon.core.document.part import ENV_PATTERN, LABEL_PATTERN, LINE_PATTERN, LINE_WORDS, PROSE_PATTERN, FieldsError

Path = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}
_BOUND = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
_PATTERNS = {
    LINE_PATTERN: LINE_WORDS,
    PROSE_PATTERN: "text without control characters",
    ENV_PATTERN: "text without the character NUL",
    LABEL_PATTERN: "letters, digits, '-', '_' and '.', at the ends letters or digits",
}
_RELATIVE = re.compile(r"([a-z][A-Za-z0-9]*(?:\[\d+\]|\.[a-z][A-Za-z0-9]*)*): (.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One wrong field: its path in the document, and what is wrong."""

    path: Path
    message: str


def findings(error: ValidationError, model: type[BaseModel], document: object) -> list[Finding]:
    """Every wrong field of ``document``, in its order of discovery, each once.

    Args:
        error: what validating it as ``model`` raised.
        model: the kind of the document.
        document: the plain value that was validated.
    """
    found: dict[Path, list[str]] = {}
    for detail in error.errors(include_url=False):
        for path, message in _translate(detail, model, document):
            messages = found.setdefault(path, [])
            if message not in messages:
                messages.append(message)
    return [Finding(path=path, message=_joined(messages)) for path, messages in found.items()]


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """A sentence that helps with a misspelt word: the near one, or all that there are."""
    names = sorted(known)
    close = difflib.get_close_matches(_folded(wrong), [_folded(name) for name in names], n=1, cutoff=0.6)
    for name in names:
        if close and _folded(name) == close[0]:
            return f"did you mean {name}?"
    return f"known: {', '.join(names)}" if names else "nothing is known here"


def shown(value: object) -> str:
    """A value as it may stand in a message: short, on one line."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the string {value[:60]!r}" + ("…" if len(value) > 60 else "")
        case int() | float():
            return str(value) if isinstance(value, float) or abs(value) < 10**40 else "a number of more than 40 digits"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return f"a {type(value).__name__}"


def _translate(detail: ErrorDetails, model: type[BaseModel], document: object) -> list[tuple[Path, str]]:
    kind, context = detail["type"], detail.get("ctx", {})
    path = _written(detail["loc"], document, missing=kind == "missing")
    value = detail["input"]
    if kind == "missing":
        description = _field_description(model, path)
        return [(path, "required, but missing" + (f": {description}" if description else ""))]
    if kind == "extra_forbidden":
        return [(path, f"unknown key; {suggestion(str(path[-1]), _known_keys(model, path[:-1]))}")]
    if kind in _EXPECTED:
        return [(path, _expected(_EXPECTED[kind], value))]
    if kind in ("literal_error", "enum"):
        choices = str(context.get("expected", ""))
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", choices), n=1) if isinstance(value, str) else []
        return [(path, _expected(choices, value) + (f"; did you mean {near[0]}?" if near else ""))]
    if kind in _BOUND:
        sign, key = _BOUND[kind]
        return [(path, _expected(f"a number {sign} {context[key]:.15g}", value))]
    if kind in ("too_short", "too_long"):
        return _wrong_length(kind, path, context, document)
    if kind in ("string_too_short", "string_too_long"):
        bound = f"at least {context['min_length']}" if kind == "string_too_short" else f"at most {context['max_length']}"
        return [(path, _expected(f"a string of {bound} characters", value))]
    if kind == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
        return [(path, _expected(_PATTERNS[context["pattern"]] if value else "text that is not empty", value))]
    if kind == "string_pattern_mismatch":
        description = _field_description(model, path)
        return [(path, _expected(f"text like {context['pattern']}", value) + (f" ({description})" if description else ""))]
    if kind in ("value_error", "assertion_error"):
        return _from_check(path, context.get("error"), value)
    return [(path, f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {shown(value)}")]


def _from_check(path: Path, error: object, value: object) -> list[tuple[Path, str]]:
    """What a validator of ours raised; a check over a whole part names fields relative to the part."""
    if isinstance(error, FieldsError):
        return [((*path, *_parsed(field)), message) for field, message in error.problems]
    text = str(error)
    relative = _RELATIVE.fullmatch(text) if isinstance(value, Mapping | BaseModel) else None
    if relative is not None:
        return [((*path, *_parsed(relative[1])), relative[2])]
    return [(path, text if isinstance(value, Mapping | list | tuple | BaseModel) else f"{text}; got {shown(value)}")]


def _wrong_length(kind: str, path: Path, context: Mapping[str, object], document: object) -> list[tuple[Path, str]]:
    value = _at(document, path)
    size = len(value) if isinstance(value, list | tuple | dict | str) else 0
    if kind == "too_short":
        least = context.get("min_length")
        # Wrong items don't count for pydantic; they are reported on their own.
        return [] if isinstance(least, int) and size >= least else [(path, f"expected at least {least}, got {size}")]
    return [(path, f"expected at most {context.get('max_length')}, got {size}")]


def _joined(messages: list[str]) -> str:
    """The branches of a union each say what they expected; together they are one sentence."""
    if len(messages) == 1:
        return messages[0]
    split = [re.fullmatch(r"expected (.+), (got .+)", message, re.DOTALL) for message in messages]
    if all(match is not None for match in split):
        wanted = " or ".join(match[1] for match in split if match is not None)
        got = next(match[2] for match in split if match is not None)
        return f"expected {wanted}, {got}"
    return "; ".join(messages)


def _expected(what: str, value: object) -> str:
    return f"expected {what}, got {shown(value)}"


def _written(loc: Sequence[str | int], document: object, *, missing: bool) -> Path:
    """``loc`` without what pydantic adds for its own sake: names of a union's branches, "[key]"."""
    path: list[str | int] = []
    value = document
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(value, Mapping):
            if part in value:
                value = value[part]
                path.append(part)
            elif missing and last:
                path.append(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
            path.append(part)
    return tuple(path)


def _at(document: object, path: Path) -> object:
    value = document
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def _parsed(path: str) -> Path:
    return tuple(int(index) if index else name for name, index in re.findall(r"([A-Za-z][A-Za-z0-9]*)|\[(\d+)\]", path))


def _models_at(model: type[BaseModel], path: Path) -> list[type[BaseModel]]:
    """The models that may stand at ``path``."""
    here = [model]
    for part in path:
        if isinstance(part, int):
            continue  # an item's annotation is inside its list's
        here = [
            inner
            for outer in here
            for name, field in outer.model_fields.items()
            if part in (field.alias, name)
            for inner in _models_in(field.annotation)
        ]
    return here


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _known_keys(model: type[BaseModel], path: Path) -> list[str]:
    return [field.alias or name for found in _models_at(model, path) for name, field in found.model_fields.items()]


def _field_description(model: type[BaseModel], path: Path) -> str:
    names = [part for part in path if isinstance(part, str)]
    for found in _models_at(model, tuple(names[:-1])):
        for name, field in found.model_fields.items():
            if names[-1] in (field.alias, name) and field.description:
                return field.description
    return ""


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
