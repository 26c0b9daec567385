"""Every decoder of what a peer sends: whatever the bytes, it gives a value or an error of the tree, in bounded time and memory.

Briefly in ``make test``; ``make fuzz`` sets ANTIPHON_FUZZ_EXAMPLES and runs them at length.
"""

from __future__ import annotations

import math
import socket
import struct
import time
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from antiphon.connectors.afd.ffn_side import FFNSide
from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.core.errors import AntiphonError
from antiphon.core.identity import Identity, new_key
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.request import RequestOutput, TokenLogprob
from antiphon.core.step import KVEvents, ModelRunnerOutput, SchedulerOutput
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.engine.core import EngineCore
from antiphon.engine.limits import SchedulerConfig
from antiphon.engine.scheduler import Scheduler
from antiphon.rpc.engine.codec import decode_submit, decode_update
from antiphon.rpc.v1 import engine_pb2 as pb
from antiphon.transport.base import HEADER_BYTES, Hello, LinkLayout
from antiphon.transport.connect.hello import Greeting, decode_greeting, encode_greeting
from antiphon.transport.connect.proof import accept_proven
from antiphon.transport.loopback import LoopbackLink, loopback_pair

from .damage import damaged, fuzz

HEADER = Header(kind=Kind.A2F, epoch=1, step=7, layer=0, ubatch=0, dtype=1, rows=2, num_bytes=64).pack()


@fuzz
@given(data=damaged(HEADER))
def test_headers(data: bytes) -> None:
    try:
        header = unpack(data, "peer")
    except AntiphonError:
        return
    assert header.pack() == data


WIDTH = 8
LAYOUT = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=4096, recv_slot_bytes=4096, fields=())


def ffn_side() -> tuple[LoopbackLink, FFNSide]:
    hellos = [Hello(worker_id=WorkerId(name), epoch=Epoch(1), layout=LAYOUT) for name in ("d/attention/0", "d/ffn/0")]
    near, far = loopback_pair(*hellos)
    side = FFNSide(
        epoch=Epoch(1),
        hidden_size=WIDTH,
        dtype=torch.float32,
        return_dtype=torch.float32,
        compute_dtype=torch.float32,
        experts_per_row=[0, 2, None],
    )
    side.add_link(far)
    return near, side


@fuzz
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(list(Kind)),
            "epoch": st.sampled_from([0, 1, 2**64 - 1]),
            "layer": st.sampled_from([0, 1, 2, 3, 65_535]),
            "dtype": st.integers(0, 255),
            "experts_per_row": st.sampled_from([0, 1, 2, 65_535]),
            "rows": st.sampled_from([0, 1, 2, 127, 2**32 - 1]),
            "num_bytes": st.sampled_from([0, 1, 64, 96, 2**32 - 1]),
        },
    ),
    payload=st.binary(max_size=200),
)
def test_rows(fields: dict[str, Any], payload: bytes) -> None:
    """A message whose header is whole and whose facts are not: its peer is dropped, or its rows are those that were sent."""
    near, side = ffn_side()
    slot = near.acquire()
    assert slot is not None
    slot.data[: len(payload)].copy_(torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)])
    near.commit(
        slot, Header(**{"kind": Kind.A2F, "epoch": 1, "dtype": 1, "rows": 1, "num_bytes": 32, **fields}).pack(), len(payload)
    )
    works = side.poll()
    if works:
        assert works[0].rows_RD.numel() * 4 <= len(payload)
        assert side.num_peers == 1
    else:
        assert side.num_peers == 0
    side.close()
    near.close()


GREETING = encode_greeting(
    Greeting(
        hello=Hello(worker_id=WorkerId("d/p/0"), epoch=Epoch(1), layout=replace(LAYOUT, fields=(("a", "b"),))), attachment=b"xyz"
    )
)


@fuzz
@given(data=damaged(GREETING))
def test_hellos(data: bytes) -> None:
    try:
        greeting = decode_greeting(data, "peer")
    except AntiphonError:
        return
    assert decode_greeting(encode_greeting(greeting), "peer") == greeting


US = Identity.parse(new_key())
OPENING = struct.pack("<IHH8s32s", 0x48544E41, 2, 0, US.key_id(), bytes(32)) + bytes(32) + GREETING


@fuzz
@given(data=damaged(OPENING))
def test_openings_of_strangers(data: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(AntiphonError):
            accept_proven(far, "stranger", time.monotonic() + 5.0, US)


RECORD = WorkerInfo(
    worker_id=WorkerId("d/p/0"),
    deployment="d",
    pool="p",
    role=Role.FFN,
    model="m",
    revision="r",
    fingerprint="f",
    epoch=Epoch(1),
    endpoint=Endpoint(rpc="h:1"),
    pid=1,
    host="h",
    load=WorkerLoad(gauges={"x": 1.0}),
).to_json()


@fuzz
@given(data=damaged(RECORD.encode()))
def test_records(data: bytes) -> None:
    try:
        info = WorkerInfo.from_json(data)
    except AntiphonError:
        return
    assert WorkerInfo.from_json(info.to_json()) == info


VOCABULARY = 50
SUBMIT = pb.SubmitCommand(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    sampling=pb.EngineSampling(
        max_tokens=3, temperature=0.5, top_p=0.9, repetition_penalty=1.1, logit_bias={1: 2.0}, num_logprobs=2
    ),
    cache_salt="s",
    traceparent="00-1-2-3",
).SerializeToString()


class Careful:
    """An executor that would fall over what an engine must not let through."""

    def poll_kv(self) -> KVEvents:
        return KVEvents()

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for new in step.new_requests:
            assert all(0 <= token_id < VOCABULARY for token_id in new.token_ids)
            values = (
                new.sampling.temperature,
                new.sampling.top_p,
                new.sampling.repetition_penalty,
                *new.sampling.logit_bias.values(),
            )
            assert all(abs(value) < float("inf") for value in values)
        return ModelRunnerOutput(sampled_token_ids=dict.fromkeys(step.num_scheduled_tokens, (1,)))


@fuzz
@given(commands=st.lists(damaged(SUBMIT), min_size=1, max_size=6))
def test_commands(commands: list[bytes]) -> None:
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_queued_requests=8,
        max_model_len=48,
        block_size_tokens=4,
        num_blocks=24,
        vocab_size=VOCABULARY,
    )
    outputs: list[RequestOutput] = []
    engine = EngineCore(Scheduler(config, lambda: 0.0), Careful(), outputs.extend)
    taken: set[str] = set()
    for data in commands:
        try:
            submit = pb.SubmitCommand.FromString(data)
        except DecodeError:
            continue
        try:
            engine.submit(decode_submit(submit, now_s=0.0))
        except AntiphonError:
            continue
        taken.add(submit.request_id)
    for _ in range(200):
        if not engine.step() and not engine.has_inbox and not engine.scheduler.has_requests:
            break
    assert {output.request_id for output in outputs if output.finish_reason is not None} == taken
    assert engine.scheduler.blocks.num_free_blocks == config.num_blocks


UPDATE = pb.EngineUpdate(
    requests=[
        pb.RequestUpdate(
            request_id="r",
            new_token_ids=[1, 2],
            logprobs=[pb.TokenLogprob(token_id=1, logprob=-0.5, rank=1, top_token_ids=[1, 2], top_logprobs=[-0.5, -1.0])],
            finish_reason="length",
            stop_token_id=2,
            times=pb.RequestTimes(queue_s=0.1, first_token_s=0.2, finished_s=0.3),
            prompt_logprobs={1: pb.TokenLogprob(token_id=3, logprob=-2.0, rank=4)},
            vector=[0.5, -0.5],
        ),
        pb.RequestUpdate(request_id="s", error_code="overloaded", error_message="full", retry_after_s=0.5),
    ]
).SerializeToString()


@fuzz
@given(data=damaged(UPDATE))
def test_updates(data: bytes) -> None:
    """What a worker answers is a value that JSON has, or an error of the tree."""
    try:
        update = pb.EngineUpdate.FromString(data)
    except DecodeError:
        return
    try:
        answers = decode_update(update, "peer")
    except AntiphonError:
        return
    for output in (answer.output for answer in answers):
        numbers = [value for logprob in (*output.logprobs, *output.prompt_logprobs.values()) for value in told(logprob)]
        times = [] if output.times is None else [output.times.scheduled_s, output.times.first_token_s, output.times.finished_s]
        assert all(math.isfinite(value) for value in (*numbers, *output.vector, *(time for time in times if time is not None)))
        assert output.error is None or len(output.error.message) <= 4096


def told(logprob: TokenLogprob) -> list[float]:
    return [logprob.logprob, *(value for _, value in logprob.top)]


def test_the_bytes_that_are_changed_are_good_ones() -> None:
    """Otherwise nothing behind the first check would be tried."""
    unpack(HEADER, "peer")
    decode_greeting(GREETING, "peer")
    WorkerInfo.from_json(RECORD)
    decode_submit(pb.SubmitCommand.FromString(SUBMIT), now_s=0.0)
    assert [answer.error is None for answer in decode_update(pb.EngineUpdate.FromString(UPDATE), "peer")] == [True, False]
    assert len(HEADER) == HEADER_BYTES
    assert zlib.crc32(HEADER[:60]) == int.from_bytes(HEADER[60:], "little")
