"""Fields of messages and values that are called the same."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from antiphon.client import status_values
from antiphon.client.values import ModelInfo, TokenProbability, Usage
from antiphon.rpc.messages.by_name import message_from, scalar_names, scalars_of, value_from
from antiphon.rpc.v1 import inference_pb2 as pb


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Usage, pb.Usage),
        (ModelInfo, pb.ModelCard),
        (TokenProbability, pb.TokenProbability),
        (status_values.GatewayStatus, pb.GatewayStatus),
        (status_values.PoolStatus, pb.PoolStatus),
        (status_values.WorkerStatus, pb.WorkerStatus),
        (status_values.CompositionStatus, pb.CompositionStatus),
        (status_values.ExpertStanding, pb.ExpertStanding),
    ],
)
def test_the_sdk_s_values_have_the_fields_of_their_messages(kind: type, message: type) -> None:
    assert {field.name for field in fields(kind)} == set(message.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined]


def test_what_is_absent_is_none_and_what_is_zero_is_zero() -> None:
    worker = pb.WorkerStatus(worker_id="w", lease_remaining_s=0.0)
    value = value_from(status_values.WorkerStatus, worker, load=None)
    assert (value.worker_id, value.lease_remaining_s, value.connected, value.num_requests) == ("w", 0.0, None, 0)
    assert scalars_of(pb.Sampling(temperature=0.0)) == {
        "temperature": 0.0,
        "min_tokens": 0,
        "ignore_eos": False,
        "speculation": "",
    }


def test_a_value_comes_back_as_it_was_sent() -> None:
    sent = status_values.PoolStatus(
        deployment="d", name="p", role="ffn", num_workers=3, num_ready=2, num_waiting=1, num_running=4, kv_usage=0.25
    )
    assert value_from(status_values.PoolStatus, message_from(pb.PoolStatus, sent)) == sent


def test_a_field_that_one_side_lacks_is_an_error() -> None:
    @dataclass
    class Other:
        id: str = "m"
        nickname: str = "n"

    with pytest.raises(KeyError, match="nickname"):
        value_from(Other, pb.ModelCard(id="m"))
    with pytest.raises(AttributeError, match="max_model_len"):
        message_from(pb.ModelCard, Other())


def test_fields_of_more_than_one_value_are_no_scalars() -> None:
    assert set(pb.Sampling.DESCRIPTOR.fields_by_name) - set(scalar_names(pb.Sampling)) == {"logit_bias", "stop_token_ids"}
