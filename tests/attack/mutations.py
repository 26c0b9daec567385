"""Inputs that are nearly right: JSON with fields exchanged, protobuf and binary messages with bytes changed. All from a seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any


class Raw(str):
    """Text that is put into JSON as it is."""

    __slots__ = ()


def _nested(depth: int, opening: str = "[", closing: str = "]") -> Raw:
    return Raw(opening * depth + closing * depth)


_NUMBERS: list[Any] = [None, True, False, 0, -1, 1, 2, 7, 128, 129, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1]
_NUMBERS += [10**30, -0.0, 0.1, 1e308, 5e-324, 2.0000001]
_NUMBERS += [Raw(text) for text in ("1" + "0" * 400, "1" * 5000, "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity", "-0")]
_TEXTS: list[Any] = ["", "a", "target", "coe/x", "../../etc/passwd", "\0", "é", "😀", "\ufeff", "\u202e", "a" * 1025, "a" * 5000]
_TEXTS += [Raw(text) for text in ('"\\ud800"', '"\\udfff\\ud800"', '"\\ud83d"')]
_TEXTS += [
    "<|im_start|>system",
    "<|im_end|>" * 50,
    "{{ 7*7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "%s%n",
    "\r\nX: 1",
    "null",
]
_TEXTS += ["1", "٣", "1_000", "0x10", " 1 ", "\n" * 50, "(a+)+$", "[" * 200, "root ::= root root", "data:text/plain;base64,AAAA"]
_LISTS: list[Any] = [
    [],
    [[]],
    [{}],
    [None],
    [1],
    [1, 2, 3],
    ["a", "b"],
    [[1, 2], [3]],
    ["a", 1],
    [True],
    [1.5],
    [-1],
    [2**31],
    [383],
]
_LISTS += [[384], [10**20], ["a"] * 20, ["a"] * 200, [1] * 3000, [[1]] * 129, [{"type": "text", "text": "x"}], [["a", "b"]] * 300]
_LISTS += [[{"role": "user", "content": "x"}] * 300, [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]]
_LISTS += [[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}], _nested(50), _nested(900), _nested(5000)]
_OBJECTS: list[Any] = [
    {},
    {"": None},
    {"a": 1},
    {"a": {"b": {"c": 1}}},
    {str(i): 1 for i in range(40)},
    {str(i): 1.0 for i in range(1100)},
]
_OBJECTS += [
    {"1e3": 1},
    {"-1": 1},
    {"5": 101},
    {"٣": 1},
    {"5": 1, "05": 2},
    {"9" * 5000: 1},
    {"type": "json_object"},
    {"regex": "(a|a)*$"},
]
_OBJECTS += [{str(i * (2**61 - 1)): 1 for i in range(900)}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}]
_OBJECTS += [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}, {"choice": ["a"] * 2000}]
_OBJECTS += [{"grammar": "root ::= root"}, {"json": {"anyOf": [{"type": "object"}] * 200}}, Raw('{"a":' * 3000 + "1" + "}" * 3000)]
_MORE_FIELDS = ["unknown", "__proto__", "__class__", "tools", "tool_choice", "stream_options", "max_completion_tokens", "n", "echo"]
_MORE_FIELDS += [
    "reasoning_effort",
    "thinking_budget",
    "prompt_logprobs",
    "guided_json",
    "guided_regex",
    "structured_outputs",
    "best_of",
]
_MORE_FIELDS += [
    "chat_template",
    "documents",
    "prompt_embeds",
    "response_format",
    "previous_response_id",
    "x" * 300,
    "\0",
    "stream",
]
_MORE_FIELDS += [
    "resume",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "instructions",
    "include",
    "truncate_prompt_tokens",
    "dimensions",
]


def _atom(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(chance.choice([_NUMBERS, _TEXTS, _LISTS, _OBJECTS])))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:8]):
            found += _places(item, (*path, index))
    return found


def _change(chance: random.Random, body: Any) -> None:
    path = chance.choice([place for place in _places(body) if place] or [()])
    if not path:
        return
    target = body
    for key in path[:-1]:
        target = target[key]
    kind = chance.random()
    if kind < 0.6:
        target[path[-1]] = _atom(chance)
    elif kind < 0.7:
        del target[path[-1]]
    elif kind < 0.85 and isinstance(target, dict):
        target[chance.choice(_MORE_FIELDS)] = _atom(chance)
    elif kind < 0.9 and isinstance(target, list):
        target *= chance.choice([2, 50])
    else:
        target[path[-1]] = [target[path[-1]]]


def _dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str.__str__(value)
    if isinstance(value, dict):
        return "{" + ",".join(json.dumps(key) + ":" + _dumped(item) for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumped, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def changed_json(chance: random.Random, good: dict[str, Any], keep: frozenset[str]) -> bytes:
    """``good`` with fields left out (but ``keep``), exchanged and added, or its bytes changed."""
    body = {key: copy.deepcopy(value) for key, value in good.items() if key in keep or chance.random() < 0.5}
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        _change(chance, body)
    data = _dumped(body).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        return changed_bytes(chance, data)
    return data


def changed_bytes(chance: random.Random, good: bytes) -> bytes:
    """``good`` with bits turned, bytes replaced, cut, doubled, or numbers of a message's encoding put in."""
    data = bytearray(good)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.randrange(256)
            case 2:
                data[at:at] = chance.randbytes(chance.choice([1, 3, 9]))
            case 3 if chance.random() < 0.3:
                del data[at:]
            case 4:
                data[at:at] = b"\xff" * chance.choice([1, 9, 10])
            case 5:
                data[at : at + 8] = chance.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
            case 6:
                data += b"\x0b" * chance.choice([1, 200, 5000]) if chance.random() < 0.2 else data[at : at + 40]
    return bytes(data)
