"""JSON of strangers: too deep is told before it is read, and no key is lost in silence, however it is written."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.text.json_text import MAX_DEPTH, KeyCount, depth_bound, is_deeper, read_json_text, structure

# What looks like a key, a colon, a bracket or an end of a text and is none; written as it stands in JSON.
_LETTERS = st.sampled_from([":", "a", "b", '\\"', "\\\\", " ", "{", "[", "]", "}", ",", "\\n", "\\u003a", '\\":', "é"])
_TEXT = st.lists(_LETTERS, max_size=4).map(lambda letters: f'"{"".join(letters)}"')
_SPACE = st.sampled_from(["", "", " ", "\n\t", "\r"])


def _inner(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.tuples(_SPACE, values, _SPACE).map("".join), max_size=4).map(lambda all_: f"[{','.join(all_)}]")
    pair = st.tuples(_SPACE, _TEXT, _SPACE, st.just(":"), _SPACE, values, _SPACE).map("".join)
    return items | st.lists(pair, max_size=4).map(lambda all_: f"{{{','.join(all_)}}}")


_JSON = st.recursive(_TEXT | st.sampled_from(["1", "null", "-2.5e3"]), _inner, max_leaves=20)


def _pairs(text: str) -> list[list[tuple[str, Any]]]:
    found: list[list[tuple[str, Any]]] = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(pairs) or dict(pairs))  # type: ignore[func-returns-value]
    return found


@settings(max_examples=2000, deadline=None)
@given(text=_JSON)
def test_keys_that_are_there_twice_are_told_from_all_others(text: str) -> None:
    twice = {name for pairs in _pairs(text) for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    keys = KeyCount()
    json.loads(text, object_hook=keys.count)
    found = keys.repeated(text.encode())
    assert (found is None) == (not twice)
    assert found is None or found in twice


@settings(max_examples=1000, deadline=None)
@given(text=_JSON)
def test_what_is_left_without_texts_is_the_structure(text: str) -> None:
    compact = json.dumps(json.loads(text), separators=(",", ":"))
    if any(len(pairs) != len(dict(pairs)) for pairs in _pairs(text)):
        return
    bare = json.loads(text, object_pairs_hook=lambda pairs: {str(index): value for index, (_, value) in enumerate(pairs)})
    signs = "".join(sign for sign in json.dumps(_without_texts(bare)) if sign in "[]{},")
    assert structure(text.encode()).decode() == structure(compact.encode()).decode() == signs


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_texts(inner) for name, inner in value.items()}
    return [_without_texts(inner) for inner in value] if isinstance(value, list) else 0


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
@pytest.mark.parametrize("before", ["", '["]]]]]\\"]]]",', '["\\\\",'])
def test_what_is_too_deep_is_refused_without_the_stack(text: str, before: str) -> None:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(200)  # no reader of a depth of 129 has it
        with pytest.raises(ValueError, match="nested more than 128 deep"):
            read_json_text(before + text)
    finally:
        sys.setrecursionlimit(limit)


def test_the_last_depth_that_is_taken_is_taken() -> None:
    assert is_deeper(read_json_text("[" * MAX_DEPTH + "]" * MAX_DEPTH), MAX_DEPTH - 1)
    with pytest.raises(ValueError, match="nested more than 128 deep"):
        read_json_text("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_thousands_of_lists_beside_each_other_are_not_deep() -> None:
    assert depth_bound(json.dumps([[[{"a": ["[[[[" * 1000]}]]] * 3000).encode()) == 5


def test_other_encodings_are_refused() -> None:
    for encoding in ("utf-16", "utf-32", "utf-16-be"):
        with pytest.raises(ValueError, match="not UTF-8"):
            read_json_text('{"a": 1}'.encode(encoding))
    assert read_json_text('{"a": "é"}'.encode("utf-8-sig")) == {"a": "é"}


def test_a_repeated_key_is_named_where_keys_are_to_be_there_once() -> None:
    assert read_json_text('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        read_json_text('{"b": [{"a": 1, "\\u0061": 2}]}', unique_keys=True)
