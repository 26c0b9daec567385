"""A part of the deployment that has gone wrong, or was taken over: one bad command or record ends with its own error."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest

from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, kv_link_layout
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.rpc.v1 import directory_pb2, directory_pb2_grpc, engine_pb2, engine_pb2_grpc, experts_pb2
from antiphon.transport.base import Hello
from antiphon.transport.connect.address import split_host
from antiphon.transport.connect.proof import connect_proven
from antiphon.transport.nixl.transport import _greeting, _Terms

from .conftest import Target
from .mutations import changed_bytes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

DEADLINE_S = 20.0
HUGE = 2**32 - 1


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def submit(request_id: str = "r", ids: Sequence[int] = (1, 2, 3), **more: Any) -> engine_pb2.EngineCommand:
    sampling = {"max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, **more.pop("sampling", {})}
    command = engine_pb2.SubmitCommand(
        request_id=request_id, prompt_token_ids=ids, sampling=engine_pb2.EngineSampling(**sampling), **more
    )
    return engine_pb2.EngineCommand(submit=command)


def session(target: Target, role: Role, commands: Sequence[engine_pb2.EngineCommand]) -> dict[str, str]:
    """The end of each request that was submitted, by id: its finish reason or its error."""
    ends: dict[str, str] = {}
    waiting = {c.submit.request_id for c in commands if c.WhichOneof("command") == "submit"}

    async def run() -> None:
        credentials = channel_credentials()
        async with grpc.aio.secure_channel(target.workers[role].endpoint.rpc, credentials, options=TARGET_OPTIONS) as channel:
            stub: Any = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Session(timeout=DEADLINE_S)
            for command in commands:
                await call.write(command)
            while waiting - ends.keys():
                update = await call.read()
                for part in update.requests:
                    if part.finish_reason:
                        ends[part.request_id] = part.error_code or part.finish_reason
            call.cancel()

    asyncio.run(run())
    return ends


BAD = {
    "token beyond the vocabulary": submit(ids=[1, 49_159]),
    "largest token": submit(ids=[HUGE]),
    "token of the output beyond": submit(output_token_ids=[HUGE], sampling={"max_tokens": 5}),
    "token beyond with a penalty": submit(ids=[60_000], sampling={"repetition_penalty": 1.5, "temperature": 1.0}),
    "temperature nan": submit(sampling={"temperature": math.nan}),
    "temperature negative": submit(sampling={"temperature": -1.0}),
    "temperature infinite": submit(sampling={"temperature": math.inf}),
    "top_p nan": submit(sampling={"temperature": 1.0, "top_p": math.nan}),
    "repetition penalty 0": submit(sampling={"temperature": 1.0, "repetition_penalty": 0.0}),
    "penalty nan": submit(sampling={"temperature": 1.0, "presence_penalty": math.nan}),
    "bias infinite": submit(sampling={"temperature": 1.0, "logit_bias": {1: math.inf}}),
    "no tokens wanted": submit(sampling={"max_tokens": 0}),
    "many logprobs": submit(sampling={"num_logprobs": HUGE}),
    "empty prompt": submit(ids=[]),
    "long prompt": submit(ids=[1] * 200_000),
    "long salt": submit(cache_salt="s" * 1_000_000),
    "long trace": submit(traceparent="x" * 10_000),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_command_ends_with_its_own_error(target: Target, name: str) -> None:
    bad = engine_pb2.EngineCommand()
    bad.CopyFrom(BAD[name])
    bad.submit.request_id = f"bad-{name}"
    good = submit(f"good-{name}", ids=[5, 6, 7, 8])
    ends = session(target, Role.ATTENTION, [good, bad])
    assert ends == {f"good-{name}": "length", f"bad-{name}": "invalid_value"}


def test_odd_commands_end_and_the_engine_goes_on(target: Target) -> None:
    commands = [
        submit("all-stop", sampling={"temperature": 1.0, "min_tokens": 1, "stop_token_ids": list(range(384))}),
        submit("tiny-temperature", sampling={"temperature": 1e-45}),
        submit("ninf", sampling={"temperature": 1.0, "logit_bias": dict.fromkeys(range(384), -3e38)}),
        submit("top-k", sampling={"temperature": 1.0, "top_k": HUGE}),
        submit("seed", sampling={"temperature": 1.0, "seed": 2**64 - 1}),
        submit("min-tokens", sampling={"min_tokens": HUGE, "max_tokens": 3}),
        submit("nobody", ids=list(range(100)), prefill_worker="nobody"),
        submit("priority", priority=-(2**31)),
        submit("deadline", deadline_ms=2**64 - 1),
        engine_pb2.EngineCommand(abort=engine_pb2.AbortCommand(request_id="unknown")),
        engine_pb2.EngineCommand(),
    ]
    assert len(session(target, Role.ATTENTION, commands)) == 9


def test_two_thousand_commands_at_once_are_answered_or_refused(target: Target) -> None:
    ends = session(target, Role.ATTENTION, [submit(f"f{i}", sampling={"max_tokens": 1}) for i in range(2000)])
    assert set(ends.values()) <= {"length", "overloaded"}


def test_records_that_are_none_are_refused_and_break_no_reading(target: Target) -> None:
    chance = random.Random(4)
    address = target.deployment.directory_address.removeprefix("grpc://")
    odd = [float("inf"), float("nan"), -1.0, 0.0, 1e308]
    with grpc.secure_channel(address, channel_credentials(), options=TARGET_OPTIONS) as channel:
        stub: Any = directory_pb2_grpc.DirectoryStub(channel)  # type: ignore[no-untyped-call]
        real = target.workers[Role.ATTENTION].to_json()
        for number in range(300):
            record = {**json.loads(real), "worker_id": f"zz/{number}", "deployment": "zz"}
            record[chance.choice(sorted(record))] = chance.choice([None, -1, 2**70, "x" * 1000, [], {}, 1.5, "\ud800", math.nan])
            text = chance.choice([json.dumps(record), "[", "[" * 100_000, "null", "9" * 5000])
            calls = [
                (stub.Register, directory_pb2.RegisterRequest(worker_info_json=text, lease_s=chance.choice([*odd, 0.3]))),
                (stub.NextEpoch, directory_pb2.NextEpochRequest(worker_id=f"zz{number}", after=chance.choice([2**63, 2**64 - 1]))),
                (stub.ClaimIndex, directory_pb2.ClaimIndexRequest(deployment="zz", pool="p" * 9999, owner="o", lease_s=1.0)),
                (stub.PutNote, directory_pb2.PutNoteRequest(topic="t", key="k", text="t", lease_s=chance.choice(odd))),
            ]
            call, request = chance.choice(calls)
            ended = call.future(request, timeout=DEADLINE_S)
            assert ended.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), ended.details()
    time.sleep(0.4)  # the few that were records end with their leases of 0.3 s


def test_superseding_by_a_far_epoch_is_refused(target: Target) -> None:
    address = target.deployment.directory_address.removeprefix("grpc://")
    real = target.workers[Role.ATTENTION]
    with grpc.secure_channel(address, channel_credentials(), options=TARGET_OPTIONS) as channel:
        stub: Any = directory_pb2_grpc.DirectoryStub(channel)  # type: ignore[no-untyped-call]
        for epoch in (2**62, 2**52, 2**45):
            info = dataclasses.replace(real, epoch=epoch, ready=False)  # type: ignore[arg-type]
            with pytest.raises(grpc.RpcError):
                stub.Register(directory_pb2.RegisterRequest(worker_info_json=info.to_json(), lease_s=60.0), timeout=DEADLINE_S)


def test_moves_that_are_none_are_refused(target: Target) -> None:
    for role in (Role.FFN, Role.ATTENTION):
        address = target.workers[role].endpoint.rpc
        with grpc.secure_channel(address, channel_credentials(), options=TARGET_OPTIONS) as channel:
            call = channel.unary_unary("/antiphon.rpc.v1.Experts/Place")
            for number, text in ((2**31, "[" * 100_000), (1, "null"), (2**32 - 1, '{"format": 1}')):
                request = experts_pb2.PlaceRequest(phase=1, number=number, placement_json=text)
                with pytest.raises(grpc.RpcError):
                    call(request.SerializeToString(), timeout=DEADLINE_S)


@pytest.mark.parametrize("role", [Role.FFN, Role.PREFILL])
def test_an_agents_description_that_is_damaged_is_refused(target: Target, role: Role) -> None:
    """NIXL reads it: what it says of damage must reach the peer's link alone."""
    info = target.workers[role]
    address = next((a for a in info.endpoint.data.split(",") if a.startswith("nixl://")), None)
    if address is None:
        pytest.skip("no worker listens on nixl:// here")
    facts = resolve_model(target.document.spec, str(target.checkpoint), info.revision)
    if role is Role.FFN:
        layout = afd_layout(facts, target.document.spec, FFNShard(), attention_end=True, ubatches=2)
    else:
        layout = kv_link_layout(facts, decode_end=True)
    chance = random.Random(3)
    for number in range(5):
        hello = Hello(worker_id=WorkerId(f"target/attention/{200 + number}"), epoch=Epoch(1), layout=layout)
        with socket.create_connection(split_host(address.removeprefix("nixl://")), DEADLINE_S) as sock:
            deadline = time.monotonic() + DEADLINE_S
            proven = connect_proven(sock, address, deadline)
            proven.send(_greeting(hello, _Terms(boot_id=bytes(16))), address, deadline)
            good = _Terms.decode(proven.receive(address, deadline).attachment, address)
            assert good.metadata, "the layout is not the worker's"
            where = chance.choice([good.address, 0, 1, 2**64 - 1])
            metadata = changed_bytes(chance, good.metadata)
            proven.send(_greeting(hello, dataclasses.replace(good, address=where, metadata=metadata)), address, deadline)
            sock.settimeout(0.1)
            try:
                sock.recv(1 << 12)  # a refusal, or a link with nobody at its end: we leave either
            except TimeoutError:
                continue
