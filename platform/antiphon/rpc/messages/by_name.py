"""Messages to values and back where both call their fields the same: the one list of such fields is the proto (request speed).

A name that only one of the two has is an error of the first call, not a field that is silently left behind. Must not know: which
messages.
"""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_M = TypeVar("_M", bound=Message)
_V = TypeVar("_V")


def message_from(kind: type[_M], value: object, **given: object) -> _M:
    """A message with every field of the proto taken from the attribute of the same name; ``given`` stand in for some.

    None leaves a field out, an enum's member stands for its value. Raises AttributeError where ``value`` lacks a field.
    """
    taken: dict[str, Any] = {}
    for name in kind.DESCRIPTOR.fields_by_name:
        item = given[name] if name in given else getattr(value, name)
        if item is not None:
            taken[name] = item.value if isinstance(item, Enum) else item
    return kind(**taken)


def value_from(kind: type[_V], message: Message, **given: object) -> _V:
    """A dataclass with every field taken from the message's of the same name; ``given`` stand in for some.

    A field with presence that is not set is None. Raises KeyError where the message lacks a field.
    """
    taken: dict[str, Any] = dict(given)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in taken:
            continue
        described = message.DESCRIPTOR.fields_by_name[field.name]
        is_set = not described.has_presence or message.HasField(field.name)
        taken[field.name] = getattr(message, field.name) if is_set else None
    return kind(**taken)


def scalar_names(kind: type[Message]) -> tuple[str, ...]:
    """Names of a message's fields that hold one number, text or truth value."""
    described = kind.DESCRIPTOR.fields
    return tuple(f.name for f in described if not f.is_repeated and f.type != FieldDescriptor.TYPE_MESSAGE)


def scalars_of(message: Message) -> dict[str, Any]:
    """Those of them that are set, by name; what has no presence in the proto counts as set."""
    described = message.DESCRIPTOR.fields_by_name
    return {
        name: getattr(message, name)
        for name in scalar_names(type(message))
        if not described[name].has_presence or message.HasField(name)
    }
