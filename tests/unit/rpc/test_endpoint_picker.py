"""The endpoint picker as a gateway of Kubernetes talks to it, over a real connection; its messages are Envoy's on the wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import grpc.aio
import pytest

from antiphon.gateway.routing.endpoints import EndpointBoard, key_of
from antiphon.rpc import endpoint_picker
from antiphon.rpc.endpoint_picker import DESTINATION_HEADER, MAX_KEY_BYTES, PickerServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import ext_proc_pb2 as pb

THREE = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'


def headers(*, end: bool = False, subset: str | None = None, mode: int | None = None) -> pb.ProcessingRequest:
    made = pb.ProcessingRequest(request_headers=pb.HttpHeaders(end_of_stream=end))
    if subset is not None:
        made.metadata_context.filter_metadata["envoy.lb.subset_hint"].update({"x-gateway-destination-endpoint-subset": subset})
    if mode is not None:
        made.protocol_config.request_body_mode = mode
    return made


def body(data: bytes, *, end: bool = True) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end))


class Gateway:
    def __init__(self, channel: grpc.aio.Channel, board: EndpointBoard) -> None:
        self._process = channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        self.board = board

    async def ask(self, *messages: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        return [answer async for answer in self._process(iter(messages), timeout=20)]


@asynccontextmanager
async def picker(endpoints: Sequence[str] = THREE) -> AsyncIterator[Gateway]:
    board = EndpointBoard()
    service = PickerServicer(board=board, key_of=key_of, endpoints=lambda: endpoints)
    async with (
        RpcServer([service], host="127.0.0.1", public=True) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Gateway(channel, board)


def picked(answer: pb.ProcessingResponse) -> list[str]:
    headers_in = answer.request_headers if answer.WhichOneof("response") == "request_headers" else answer.request_body
    (option,) = headers_in.response.header_mutation.set_headers
    assert option.header.key == DESTINATION_HEADER
    assert option.append_action == pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    told = option.header.raw_value.decode()
    assert answer.dynamic_metadata["envoy.lb"][DESTINATION_HEADER] == told
    return told.split(",")


async def test_a_streamed_body_is_looked_at_and_passed_on_whole() -> None:
    async with picker() as gateway:
        first, *rest = await gateway.ask(headers(), body(CHAT[:20], end=False), body(CHAT[20:]))
        assert set(picked(first)) == set(THREE)
        parts = [answer.request_body.response.body_mutation.streamed_response for answer in rest]
        assert b"".join(part.body for part in parts) == CHAT
        assert [part.end_of_stream for part in parts] == [False, True]
        again, *_ = await gateway.ask(headers(), body(CHAT))
        assert picked(again) == picked(first)


async def test_a_long_body_is_not_waited_for() -> None:
    async with picker() as gateway:
        long = [body(b"x" * MAX_KEY_BYTES, end=False), body(b"y" * 10, end=False), body(b"z")]
        answers = await gateway.ask(headers(), *long)
        picked(answers[0])
        parts = [answer.request_body.response.body_mutation.streamed_response for answer in answers[1:]]
        assert [part.body for part in parts] == [message.request_body.body for message in long]


async def test_a_buffered_body_is_answered_in_turns() -> None:
    async with picker() as gateway:
        first, second = await gateway.ask(headers(mode=pb.BUFFERED), body(CHAT))
        assert first == pb.ProcessingResponse(request_headers=pb.HeadersResponse())
        assert set(picked(second)) == set(THREE)


async def test_a_request_without_a_body_is_picked_for_at_once() -> None:
    async with picker() as gateway:
        (answer,) = await gateway.ask(headers(end=True))
        assert set(picked(answer)) == set(THREE)


@pytest.mark.parametrize(
    ("known", "subset", "expected"),
    [
        (THREE, "10.0.0.2:8000", ["10.0.0.2:8000"]),
        (THREE, "10.9.9.9:8000, 10.0.0.3:8000", ["10.0.0.3:8000"]),
        ((), THREE[0], [THREE[0]]),
    ],
)
async def test_a_subset_is_kept_to(known: Sequence[str], subset: str, expected: list[str]) -> None:
    async with picker(known) as gateway:
        first, *_ = await gateway.ask(headers(subset=subset), body(CHAT))
        assert picked(first) == expected


@pytest.mark.parametrize(("known", "subset"), [((), None), (THREE, "10.9.9.9:8000")])
async def test_nobody_to_pick_is_503(known: Sequence[str], subset: str | None) -> None:
    async with picker(known) as gateway:
        (answer,) = await gateway.ask(headers(subset=subset), body(CHAT))
        assert answer.immediate_response.status.code == 503


async def test_answers_pass_and_their_end_ends_the_request() -> None:
    async with picker() as gateway:
        back = [
            pb.ProcessingRequest(response_headers=pb.HttpHeaders()),
            pb.ProcessingRequest(response_body=pb.HttpBody(body=b"data: 1\n\n")),
            pb.ProcessingRequest(response_body=pb.HttpBody(body=b"", end_of_stream=True)),
            pb.ProcessingRequest(response_trailers=pb.HttpTrailers()),
        ]
        answers = await gateway.ask(headers(), body(CHAT), *back)
        kinds = [answer.WhichOneof("response") for answer in answers[2:]]
        assert kinds == ["response_headers", "response_body", "response_body", "response_trailers"]
        assert answers[3].response_body.response.body_mutation.streamed_response.body == b"data: 1\n\n"
        assert gateway.board.rank("k", THREE) == EndpointBoard().rank("k", THREE)


SHOW = """
import json, sys
from envoy.service.ext_proc.v3 import external_processor_pb2 as envoy
from antiphon.rpc.v1 import ext_proc_pb2 as ours

def names(kind):
    return {value.name: value.number for value in kind.values}

def differences(mine, theirs, seen):
    if mine.name in seen:
        return
    seen.add(mine.name)
    for field in mine.fields:
        other = theirs.fields_by_number.get(field.number)
        at = f"{mine.name}.{field.name}"
        if other is None or other.name != field.name:
            yield at
            continue
        kinds = {field.type, other.type}
        if len(kinds) > 1 and kinds != {field.TYPE_INT32, field.TYPE_ENUM} or field.is_repeated != other.is_repeated:
            yield at
        if (field.containing_oneof and field.containing_oneof.name) != (other.containing_oneof and other.containing_oneof.name):
            yield at
        if field.enum_type and names(field.enum_type) != names(other.enum_type):
            yield at
        if field.message_type and field.message_type.full_name.startswith("antiphon"):
            yield from differences(field.message_type, other.message_type, seen)

seen = set()
found = [d for name in ("ProcessingRequest", "ProcessingResponse")
         for d in differences(ours.DESCRIPTOR.message_types_by_name[name], envoy.DESCRIPTOR.message_types_by_name[name], seen)]
print(json.dumps([len(seen), found]))
"""


def test_its_messages_are_those_of_envoy(envoy_path: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, envoy_path])}
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, timeout=120, check=True)
    num_messages, different = json.loads(done.stdout)
    assert num_messages > 15
    assert different == []


@pytest.mark.parametrize("is_picked", [False, True])
async def test_a_gateway_that_says_no_more_is_ended_and_counts_no_more(monkeypatch: pytest.MonkeyPatch, is_picked: bool) -> None:
    monkeypatch.setattr(endpoint_picker, "ANSWER_S" if is_picked else "ASK_S", 0.3)
    async with picker() as gateway:
        call = gateway._process(timeout=20.0)
        await call.write(headers())
        if is_picked:
            await call.write(body(CHAT))
            picked(await call.read())
            assert gateway.board._inflight  # it is on its way
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not gateway.board._inflight


def test_pieces_without_a_byte_are_not_kept() -> None:
    service = PickerServicer(board=EndpointBoard(), key_of=key_of, endpoints=lambda: THREE)
    with ExitStack() as stack:
        turn = endpoint_picker._Turn(service, stack)
        turn.take(headers())
        for _ in range(10_000):
            assert turn.take(body(b"", end=False)) == []
        assert len(turn.take(body(CHAT))) == 2  # the pick, and what there is of a body


async def test_half_of_a_surrogate_pair_is_picked_for_as_other_text() -> None:
    async with picker() as gateway:
        for text in (rb'{"model": "\ud800", "prompt": "x"}', rb'{"model": "m", "messages": "\udfff"}'):
            first, *_ = await gateway.ask(headers(), body(text))
            assert set(picked(first)) == set(THREE)
