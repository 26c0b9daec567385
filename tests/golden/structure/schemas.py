"""Random JSON schemas of most of the language, for tests and for the night's run: what a client might write, sane or not.

Keywords that an engine may not know are among them: such a schema is refused, never taken and then not held.
"""

from __future__ import annotations

from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = ("id", "name", "a b", "ünï", 'quo"te', "$ref", "back\\slash", "")
TEXTS = ("x", "y z", 'q"', "ñ", "日本", "\n", "\\", "</tool_call>", "🎵")
PATTERNS = (
    "^[a-c]{1,3}$",
    "^\\d{2}-\\d{2}$",
    "^(ab|cd)+$",
    "x",
    '^[^"]{0,5}$',
    "^\\w+@\\w+$",
    "^é?$",
    "(?i)^yes$",
    "^a|b$",
    "\\.$",
)
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "uri", "hostname", "duration")
UNCOMMON: tuple[Schema, ...] = (
    {"uniqueItems": True},
    {"contains": {"type": "integer"}},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 2}},
    {"propertyNames": {"pattern": "^a"}},
    {"dependentRequired": {"id": ["name"]}},
    {"unevaluatedProperties": False},
    {"minProperties": 1},
    {"maxProperties": 2},
)


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    return st.fixed_dictionaries({}, optional=fields)


def _bounded(low: str, high: str, most: int) -> st.SearchStrategy[Schema]:
    """Bounds that are mostly in order."""
    pair = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return st.one_of(
        st.just({}), pair.map(lambda p: {low: p[0], high: p[1]}), pair.map(lambda p: {high: p[1]}), pair.map(lambda p: {low: p[0]})
    )


def _joined(*parts: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.tuples(*parts).map(lambda made: {key: value for part in made for key, value in part.items()})


_values = st.integers(-99, 99) | st.sampled_from(TEXTS) | st.booleans() | st.none() | st.sampled_from([0.5, -1.25, 1e6])
_values = _values | st.lists(_values, max_size=2) | st.dictionaries(st.sampled_from(NAMES), _values, max_size=2)
_numbers = st.integers(-1000, 1000) | st.sampled_from([0.25, -3.5, 99.75])
_ranges = st.one_of(
    st.just({}),
    st.tuples(_numbers, _numbers).map(sorted).map(lambda p: {"minimum": p[0], "maximum": p[1]}),
    st.tuples(_numbers, _numbers).map(sorted).map(lambda p: {"exclusiveMinimum": p[0], "exclusiveMaximum": p[1]}),
    _numbers.map(lambda n: {"minimum": n}),
    _numbers.map(lambda n: {"exclusiveMaximum": n}),
)
_steps = st.one_of(st.just({}), st.sampled_from([1, 2, 7, 0.5, 10]).map(lambda n: {"multipleOf": n}))
_leaves: st.SearchStrategy[Schema] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    _joined(st.just({"type": "integer"}), _ranges, _steps),
    _joined(st.just({"type": "number"}), _ranges),
    _joined(st.just({"type": "string"}), _bounded("minLength", "maxLength", 8)),
    st.sampled_from(PATTERNS).map(lambda p: {"type": "string", "pattern": p}),
    _joined(st.sampled_from(PATTERNS).map(lambda p: {"type": "string", "pattern": p}), _bounded("minLength", "maxLength", 6)),
    st.sampled_from(FORMATS).map(lambda f: {"type": "string", "format": f}),
    st.lists(_values, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    _values.map(lambda value: {"const": value}),
    st.lists(st.sampled_from(["string", "integer", "null", "boolean"]), min_size=1, max_size=3, unique=True).map(
        lambda types: {"type": types}
    ),
    st.sampled_from(UNCOMMON),
    st.just({}),
    st.just({"$ref": "#/$defs/one"}),
)


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.builds(
        _object,
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
        st.just(False) | st.just(False) | st.none() | inner,
        st.none() | st.none() | inner,
    )


def _object(made: dict[str, Schema], also_needed: list[str], others: Schema | bool | None, matching: Schema | None) -> Schema:
    needed = [*list(made)[: len(made) // 2 + 1], *also_needed]
    found: Schema = {"type": "object", "properties": made, "required": list(dict.fromkeys(needed))}
    if others is not None:
        found["additionalProperties"] = others
    if matching is not None:
        found["patternProperties"] = {"^x_": matching}
    return found


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return _joined(
        st.just({"type": "array"}),
        inner.map(lambda item: {"items": item}) | st.just({}),
        st.lists(inner, min_size=1, max_size=2).map(lambda items: {"prefixItems": items}) | st.just({}),
        _bounded("minItems", "maxItems", 3),
    )


def _with_definitions(made: tuple[Schema, Schema]) -> Schema:
    """References inside lead to a definition, which may refer to itself."""
    return {**made[0], "$defs": {"one": made[1]}}


_inner: st.SearchStrategy[Schema] = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        _objects(inner),
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"oneOf": options}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"allOf": options}),
        st.tuples(inner, inner).map(lambda pair: {**pair[0], "anyOf": [pair[1]]}),
        _objects(inner).map(lambda made: {**made, "description": "what it is", "title": "One", "default": {}}),
    ),
    max_leaves=6,
)
schemas: st.SearchStrategy[Schema] = st.tuples(_inner, _inner).map(_with_definitions)


def drawn(count: int, first_seed: int) -> list[Schema]:
    """So many different schemas; the same for the same seed."""
    found: dict[str, Schema] = {}
    number = first_seed
    while len(found) < count:

        @seed(number)
        @given(schema=schemas)
        @settings(
            max_examples=min(2000, 20 + count - len(found)), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def collect(schema: Schema) -> None:
            found.setdefault(repr(schema), schema)

        collect()
        number += 1
    return list(found.values())[:count]


def validate(schema: Schema, value: object) -> None:
    """Raises jsonschema.ValidationError where a value is not of its schema, formats included."""
    known = jsonschema.Draft202012Validator
    known(schema, format_checker=known.FORMAT_CHECKER).validate(value)
