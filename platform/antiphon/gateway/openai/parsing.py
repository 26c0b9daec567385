"""Bodies to typed values with errors that name the field (request speed).

A field that nobody knows is refused, or dropped and named to the client, as the document says. Must not know: which bodies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import containers

_M = TypeVar("_M", bound=BaseModel)

UnknownFields = Literal["refuse", "ignore"]

_BRANCHES = frozenset({"str", "int", "float", "bool"})  # pydantic's names for a union's branches
MAX_FIELDS = 256  # of a body
MAX_BODY_VALUES = 250_000  # in all its lists and objects, the prompt left out
_MAX_NAMED = 16  # unknown fields that one answer's header names
_MAX_NAME_CHARS = 64


class UnknownField(InvalidInput):
    """A field that no version of the API has."""

    code = "unknown_parameter"


class UnsupportedField(InvalidInput):
    """A field, or a value of one, that would change the result and isn't supported."""

    code = "unsupported_parameter"


def parse(kind: type[_M], value: object, *, prefix: str = "") -> _M:
    """Validate ``value``; ``prefix`` goes before the fields' names in errors.

    Raises:
        InvalidInput: the first wrong field, named; UnknownField for one that doesn't exist.
    """
    return parse_tolerant(kind, value, "refuse", prefix=prefix)[0]


_MAX_IGNORED = 64  # unknown fields of one body
_MAX_ERRORS = 4096  # of one body, that are looked at
_MAX_THIN = 32  # items of a list or object that stand for all, where there are more errors


def parse_tolerant(kind: type[_M], value: object, unknown: UnknownFields, *, prefix: str = "") -> tuple[_M, tuple[str, ...]]:
    """As ``parse``; with "ignore" the paths of the fields that nobody knows come back beside the value.

    Raises:
        InvalidInput: the first wrong field, named.
    """
    _check_sizes(value, prefix)
    try:
        return kind.model_validate(value), ()
    except ValidationError as error:
        if error.error_count() > _MAX_ERRORS:  # describing each takes microseconds, on everybody's event loop
            raise _first_of_many(kind, value, error.error_count(), prefix) from None
        unknown_at = [e["loc"] for e in error.errors(include_url=False, include_context=False) if e["type"] == "extra_forbidden"]
        if unknown == "refuse" or not unknown_at or len(unknown_at) > _MAX_IGNORED:  # leaving one out copies what is around it
            raise _translate(error, prefix) from error
    for location in unknown_at:
        value = _without(value, location)
    try:
        return kind.model_validate(value), tuple(prefix + _path(location) for location in unknown_at)
    except ValidationError as error:
        raise _translate(error, prefix) from error


def _first_of_many(kind: type[BaseModel], value: object, num_errors: int, prefix: str) -> InvalidInput:
    """An error among very many: one that the first items of each list and object show, else their number alone."""
    try:
        kind.model_validate(_thinned(value))
    except ValidationError as error:
        if error.error_count() <= _MAX_ERRORS:
            return _translate(error, prefix, may_be_missing=False)
    return InvalidInput(f"{prefix}the body has {num_errors} fields or values that are wrong or unknown")


def _thinned(value: object) -> object:
    if isinstance(value, dict):
        return {key: _thinned(item) for key, item in itertools.islice(value.items(), _MAX_THIN)}
    if isinstance(value, list):
        return [_thinned(item) for item in value[:_MAX_THIN]]
    return value


def refuse_unsupported(value: object, unsupported: Mapping[str, tuple[object, ...]], prefix: str = "") -> object:
    """A body without the fields of ``unsupported``: field → values that change nothing, besides null.

    Raises:
        UnsupportedField: one has another value.
    """
    if not isinstance(value, dict):
        return value
    for name, harmless in unsupported.items():
        given = value.get(name)
        if given is not None and not any(type(given) is type(item) and given == item for item in harmless):
            raise UnsupportedField(f"{prefix}{name} is not supported", f"{prefix}{name}")
    return {name: given for name, given in value.items() if name not in unsupported}


def warning_header(ignored: tuple[str, ...]) -> dict[str, str]:
    """The header that tells a client which of its fields changed nothing; none when there are none."""
    if not ignored:
        return {}
    names = ["".join(c for c in name if c.isascii() and (c.isalnum() or c in "_.[]-"))[:_MAX_NAME_CHARS] for name in ignored]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return {"warning": f'299 antiphon "parameters ignored: {", ".join(names[:_MAX_NAMED])}{more}"'}


def _check_sizes(value: object, prefix: str) -> None:
    """Refuse bodies with more values than any request has: validation describes each wrong one before the first can be told."""
    if not isinstance(value, dict):
        return
    if len(value) > MAX_FIELDS:
        raise InvalidInput(f"the body has {len(value)} fields, more than {MAX_FIELDS}")
    num_values = 0
    open_values = [
        item for name, item in value.items() if name not in ("prompt", "input") or isinstance(item, dict)
    ]  # checked by hand
    while open_values:
        item = open_values.pop()
        if isinstance(item, dict | list):
            num_values += len(item)
            if num_values > MAX_BODY_VALUES:
                raise InvalidInput(f"{prefix}the body holds more than {MAX_BODY_VALUES} values besides its prompt")
            open_values += containers(item.values() if isinstance(item, dict) else item)


def _without(value: object, location: tuple[int | str, ...]) -> object:
    """A copy of ``value`` without the field at pydantic's location; parts that name a union's branch are skipped."""
    head, rest = location[0], location[1:]
    if isinstance(value, dict):
        if head not in value:
            return _without(value, rest) if rest else value
        return {k: v for k, v in value.items() if k != head} if not rest else {**value, head: _without(value[head], rest)}
    if isinstance(value, list) and isinstance(head, int):
        return [_without(item, rest) if index == head and rest else item for index, item in enumerate(value)]
    return _without(value, rest) if rest else value


def _translate(error: ValidationError, prefix: str, *, may_be_missing: bool = True) -> InvalidInput:
    """The first error. Without ``may_be_missing``, one of what is there, if there is any: part of the value was left out."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((e for e in errors if may_be_missing or e["type"] != "missing"), errors[0])
    field = prefix + _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return UnknownField(f"unknown parameter: {field[:200]}", field)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidInput(f"missing required parameter: {field}", field)
    return InvalidInput(f"{field}: {message[:1].lower()}{message[1:]}" if field else message, field or None)


def _path(location: tuple[int | str, ...]) -> str:
    """pydantic's location as clients write it: messages[0].content. Branches of unions are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _BRANCHES or "[" in part:
            continue
        else:
            path += f".{part}" if path else part
    return path
