"""A worker's record is taken field by field: whatever somebody registers, those who read it get values of the right types."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad

GOOD = WorkerInfo(
    worker_id=WorkerId("d/p/0"),
    deployment="d",
    pool="p",
    role=Role.ATTENTION,
    model="m",
    revision="r",
    fingerprint="f",
    epoch=Epoch(3),
    endpoint=Endpoint(rpc="h:1", data="shm://x,grpc://h:2"),
    pid=1,
    host="h",
    message="waiting for\nFFN workers",
    load=WorkerLoad(gauges={"sum_step_s": 0.5, "num": 3}),
)


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(GOOD.to_json()), **fields})


def test_a_good_record_comes_back_and_unknown_fields_of_a_newer_version_are_ignored() -> None:
    assert WorkerInfo.from_json(GOOD.to_json()) == GOOD
    assert WorkerInfo.from_json(changed(something_new=[1])) == GOOD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", None),
        ("worker_id", "x" * 1000),
        ("worker_id", "a\nb"),
        ("worker_id", "\ud800"),
        ("model", 7),
        ("model", "\ud800"),
        ("epoch", -1),
        ("epoch", 2**62),
        ("epoch", 1.5),
        ("epoch", True),
        ("max_model_len", None),
        ("vocab_size", "many"),
        ("ready", 1),
        ("message", ["x"]),
        ("role", "king"),
        ("endpoint", []),
        ("endpoint", {"rpc": 3}),
        ("load", {"num_running": math.nan}),
        ("load", {"gauges": {"x": math.nan}}),
        ("load", {"gauges": {"x": math.inf}}),
        ("load", {"gauges": {"x": "1"}}),
        ("load", {"gauges": {f"g{i}": 0.0 for i in range(1000)}}),
        ("load", {"gauges": {"x": 10**400}}),
        ("shard", {"tensor_index": None}),
    ],
)
def test_a_field_of_another_type_or_out_of_bounds_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match="not a worker record"):
        WorkerInfo.from_json(changed(**{field: value}))


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "9" * 5000, "{}", '{"a":' * 50_000, "x" * 1_000_000])
def test_what_is_no_record_at_all_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        WorkerInfo.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(sorted(json.loads(GOOD.to_json()))), value=JSON)
def test_whatever_a_field_holds_it_is_refused_or_can_be_written_again(field: str, value: object) -> None:
    try:
        info = WorkerInfo.from_json(changed(**{field: value}))
    except InvalidInput:
        return
    written = info.to_json()
    written.encode()
    assert json.loads(written, parse_constant=lambda name: pytest.fail(name)) is not None
    assert WorkerInfo.from_json(written) == info
