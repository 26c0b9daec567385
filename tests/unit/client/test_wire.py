"""Asking: what no message could carry is refused here, with the field's name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antiphon.client.settings import Settings
from antiphon.client.wire import GenerateOptions, chunk_of, generate_request
from antiphon.core.errors import InvalidInput
from antiphon.rpc.v1 import inference_pb2 as pb


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "token_ids": [1]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": 7}, "token_ids"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2**40}, "max_tokens"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "n": 1.5}, "n"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": 3}, "logit_bias"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"messages": [{"role": "user", "text": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": ""}, 3]}, "messages[1]"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ],
)
def test_what_no_message_can_carry_is_refused_with_its_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        generate_request("m", options)
    assert caught.value.field == field


def test_an_empty_list_of_token_ids_is_still_the_input() -> None:
    assert generate_request("m", {"token_ids": []}).WhichOneof("input") == "tokens"


def test_zero_is_not_absence() -> None:
    sampling = generate_request("m", {"prompt": "x", "temperature": 0.0, "top_k": 0}).sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("top_k")
    assert not sampling.HasField("max_tokens")


def test_a_stop_token_of_id_zero_is_not_lost() -> None:
    chunk = chunk_of(pb.Delta(finish_reason=pb.FINISH_REASON_STOP, stop_token_id=0))
    assert chunk.stop_token_id == 0
    assert chunk.stop_string is None


@pytest.mark.parametrize("bad", [{"api_key": "a\nb"}, {"api_key": "ключ"}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_settings_that_can_not_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Settings(**bad)


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_a_call_needs_a_real_deadline(timeout_s: float) -> None:
    with pytest.raises(InvalidInput, match="timeout_s"):
        Settings().timeout_of({"prompt": "x", "timeout_s": timeout_s})


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GenerateOptions.__annotations__)), VALUES, max_size=6))
@example({"prompt": "x", "tools": None})
def test_no_options_at_all_raise_anything_else(options: Any) -> None:
    try:
        request = generate_request("m", options)
    except InvalidInput:
        return
    wire = request.SerializeToString(deterministic=True)  # compared as bytes: NaN is never equal
    assert pb.GenerateRequest.FromString(wire).SerializeToString(deterministic=True) == wire
