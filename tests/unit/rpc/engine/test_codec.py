"""Commands and updates survive the wire."""

from __future__ import annotations

import pytest

from antiphon.core.errors import AntiphonError, DeadlineExceeded, ErrorInfo, InternalError, Overloaded
from antiphon.core.request import (
    FinishReason,
    Request,
    RequestId,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    TokenLogprob,
)
from antiphon.rpc.engine.codec import decode_submit, decode_update, encode_abort, encode_refusal, encode_submit, encode_update
from antiphon.rpc.v1 import engine_pb2 as pb

SAMPLING = SamplingParams(
    max_tokens=17,
    temperature=0.5,
    top_p=0.75,
    top_k=40,
    min_p=0.125,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    repetition_penalty=1.5,
    logit_bias={7: -100.0, 9: 2.5},
    seed=2**64 - 1,
    stop_token_ids=frozenset({3, 5}),
    min_tokens=2,
    ignore_eos=True,
    num_logprobs=0,
    speculates=False,
)
REQUEST = Request(
    request_id=RequestId("r-1"),
    prompt_token_ids=(1, 2, 151_000),
    sampling=SAMPLING,
    eos_token_ids=frozenset({2, 0}),
    output_token_ids=(8, 9),
    arrival_s=100.0,
    deadline_s=102.5,
    priority=-3,
    prefill_worker="d/prefill/0",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    cache_salt="tenant",
)


def over_the_wire(command: pb.EngineCommand) -> pb.EngineCommand:
    return pb.EngineCommand.FromString(command.SerializeToString())


def test_a_request_arrives_as_it_was_sent() -> None:
    wire = over_the_wire(encode_submit(REQUEST, deadline_left_s=2.5))
    assert decode_submit(wire.submit, now_s=100.0) == REQUEST


def test_a_request_without_options_arrives_without_them() -> None:
    plain = Request(request_id=RequestId("r"), prompt_token_ids=(4,), sampling=SamplingParams(max_tokens=1), arrival_s=3.0)
    wire = over_the_wire(encode_submit(plain, deadline_left_s=None))
    assert decode_submit(wire.submit, now_s=3.0) == plain


def test_a_deadline_that_has_passed_still_arrives_as_a_deadline() -> None:
    wire = over_the_wire(encode_submit(REQUEST, deadline_left_s=-1.0))
    assert decode_submit(wire.submit, now_s=5.0).deadline_s == pytest.approx(5.001)


def test_an_abort_names_its_request() -> None:
    assert over_the_wire(encode_abort(RequestId("x"))).abort.request_id == "x"


def test_an_output_arrives_as_it_was_sent() -> None:
    output = RequestOutput(
        request_id=RequestId("r"),
        new_token_ids=(5, 6),
        logprobs=(
            TokenLogprob(token_id=5, logprob=-0.5, rank=0, top=((5, -0.5), (7, -1.25))),
            TokenLogprob(token_id=6, logprob=-2.0, rank=4),
        ),
        finish_reason=FinishReason.STOP,
        stop_token_id=0,
        num_cached_tokens=16,
        num_remote_tokens=32,
        num_preemptions=1,
        times=RequestTimes(arrival_s=0.0, scheduled_s=0.5, first_token_s=1.5, finished_s=2.0),
    )
    wire = pb.EngineUpdate.FromString(encode_update([output]).SerializeToString())
    (answer,) = decode_update(wire, "w")
    assert answer.output == output
    assert answer.error is None


def test_times_are_counted_from_the_arrival() -> None:
    times = RequestTimes(arrival_s=1000.0, scheduled_s=1000.25, first_token_s=1001.0)
    wire = encode_update([RequestOutput(request_id=RequestId("r"), finish_reason=FinishReason.ABORT, times=times)])
    decoded = decode_update(wire, "w")[0].output.times
    assert decoded == RequestTimes(arrival_s=0.0, scheduled_s=0.25, first_token_s=1.0, finished_s=None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ErrorInfo(code="deadline_exceeded", message="deadline exceeded"), DeadlineExceeded, "deadline exceeded"),
        (ErrorInfo(code="overloaded", message="no KV blocks", retryable=True), Overloaded, "no KV blocks"),
        (ErrorInfo(code="of a newer engine", message="something broke: badly"), InternalError, "something broke: badly"),
    ],
)
def test_the_reason_of_an_end_becomes_an_error(error: ErrorInfo, kind: type[AntiphonError], message: str) -> None:
    output = RequestOutput(request_id=RequestId("r"), finish_reason=FinishReason.ERROR, error=error)
    answer = decode_update(encode_update([output]), "w")[0]
    assert type(answer.error) is kind
    assert str(answer.error) == message


def test_an_abort_of_the_gateways_own_carries_no_error() -> None:
    output = RequestOutput(request_id=RequestId("r"), finish_reason=FinishReason.ABORT)
    assert decode_update(encode_update([output]), "w")[0].error is None


def test_a_refusal_keeps_kind_message_and_retry_after() -> None:
    wire = encode_refusal(RequestId("r"), Overloaded("the queue is full", retry_after_s=2.5))
    answer = decode_update(wire, "w")[0]
    assert answer.output.finish_reason is FinishReason.ERROR
    assert isinstance(answer.error, Overloaded)
    assert answer.error.retry_after_s == 2.5


def test_an_unknown_finish_reason_is_an_error_and_no_silence() -> None:
    update = pb.EngineUpdate(requests=[pb.RequestUpdate(request_id="r", finish_reason="melted")])
    answer = decode_update(update, "w")[0]
    assert answer.output.finish_reason is FinishReason.ERROR
    assert isinstance(answer.error, InternalError)
