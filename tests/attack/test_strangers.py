"""Whoever can reach the ports of a running deployment, but has no key: nothing is read, forged or stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import psutil
import pytest

from antiphon.core.errors import AntiphonError
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.rpc.v1 import directory_pb2, directory_pb2_grpc, engine_pb2, engine_pb2_grpc, experts_pb2
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.connect.hello import HELLO_VERSION, MAGIC, Greeting, encode_greeting
from antiphon.transport.connect.proof import connect_proven

from .conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

DEADLINE_S = 15.0


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


@pytest.fixture(params=["in the clear", "without a certificate", "with another deployment's"])
def knock(request: pytest.FixtureRequest, target: Target) -> Callable[[str], grpc.Channel]:
    """Three ways to connect for who has no key."""

    def open_it(address: str) -> grpc.Channel:
        if request.param == "in the clear":
            return grpc.insecure_channel(address)
        if request.param == "without a certificate":
            return grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=TARGET_OPTIONS)
        return grpc.secure_channel(address, channel_credentials(target.stranger), options=TARGET_OPTIONS)

    return open_it


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_the_directory_lists_registers_and_supersedes_nobody(target: Target, knock: Callable[[str], grpc.Channel]) -> None:
    address = target.deployment.directory_address.removeprefix("grpc://")
    real = target.workers[Role.ATTENTION]
    fake = replace(real, worker_id=WorkerId("target/attention/7"), epoch=Epoch(1), endpoint=Endpoint(rpc="127.0.0.1:1"))
    with knock(address) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)  # type: ignore[no-untyped-call]
        refused(lambda: stub.ListWorkers(directory_pb2.ListWorkersRequest(), timeout=DEADLINE_S))
        for info in (fake, replace(real, epoch=Epoch(2**62), ready=False)):
            request = directory_pb2.RegisterRequest(worker_info_json=info.to_json(), lease_s=3600.0)
            refused(lambda r=request: stub.Register(r, timeout=DEADLINE_S))  # type: ignore[misc]
        refused(
            lambda: stub.NextEpoch(directory_pb2.NextEpochRequest(worker_id=real.worker_id, after=2**64 - 1), timeout=DEADLINE_S)
        )
        refused(lambda: stub.PutNote(directory_pb2.PutNoteRequest(topic="t", key="k", text="x", lease_s=9), timeout=DEADLINE_S))


def test_the_engines_door_takes_no_command(target: Target, knock: Callable[[str], grpc.Channel]) -> None:
    sampling = engine_pb2.EngineSampling(max_tokens=2, top_p=1, repetition_penalty=1)
    for ids in ([1, 2, 3], [1, 49_159], [2**32 - 1]):
        submit = engine_pb2.SubmitCommand(request_id="r", prompt_token_ids=ids, sampling=sampling)
        with knock(target.workers[Role.ATTENTION].endpoint.rpc) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]
            commands = iter([engine_pb2.EngineCommand(submit=submit)])
            refused(lambda c=commands, s=stub: list(s.Session(c, timeout=DEADLINE_S)))  # type: ignore[misc]


def test_no_expert_is_moved_or_counted(target: Target, knock: Callable[[str], grpc.Channel]) -> None:
    for role in (Role.FFN, Role.ATTENTION):
        with knock(target.workers[role].endpoint.rpc) as channel:
            for name, request in (
                ("Place", experts_pb2.PlaceRequest(phase=1, number=2**31, placement_json="[" * 1000)),
                ("GetExpertLoad", experts_pb2.GetExpertLoadRequest()),
            ):
                call = channel.unary_unary(f"/antiphon.rpc.v1.Experts/{name}")
                refused(lambda c=call, r=request: c(r.SerializeToString(), timeout=DEADLINE_S))  # type: ignore[misc]


def garbage(count: int) -> Iterator[bytes]:
    chance = random.Random(3)
    prefix = struct.Struct("<IHHII")
    texts = [b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xff", b"1" * 6000, b"NaN", b'"x"']
    for _ in range(count):
        match chance.randrange(4):
            case 0:
                yield os.urandom(chance.choice([0, 1, 15, 16, 17, 48, 64, 1000]))
            case 1:
                version, kind = chance.choice([0, 1, HELLO_VERSION]), chance.choice([0, 1, 2, 3])
                length, more = chance.choice([0, 5, 2**20, 2**32 - 1]), chance.choice([0, 2**24, 2**32 - 1])
                yield prefix.pack(MAGIC, version, kind, length, more) + os.urandom(5)
            case 2:
                text = chance.choice(texts)
                yield prefix.pack(MAGIC, chance.choice([1, HELLO_VERSION]), 1, len(text), 0) + text
            case _:
                hello = {
                    "worker_id": "evil/attention/9",
                    "epoch": 1,
                    "channel": "afd",
                    "num_slots": 2,
                    "fields": [["a", "b"]] * 30_000,
                }
                text = json.dumps(hello).encode()
                yield prefix.pack(MAGIC, HELLO_VERSION, 1, len(text), 0) + text


def data_addresses(target: Target, scheme: str) -> list[str]:
    found = []
    for role in (Role.FFN, Role.PREFILL):
        for address in target.workers[role].endpoint.data.split(","):
            if address.startswith(scheme):
                found.append(address.removeprefix(scheme))
    if not found:
        pytest.skip(f"no worker listens on {scheme} here")
    return found


def connect(scheme: str, address: str) -> socket.socket:
    if scheme == "shm://":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE_S)
        sock.connect(address if address.startswith("/") else f"\0{address}")
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


@pytest.mark.parametrize("scheme", ["shm://", "nixl://"])
def test_garbage_at_the_data_doors_is_dropped(target: Target, scheme: str) -> None:
    for address in data_addresses(target, scheme):
        for frame in garbage(150):
            with connect(scheme, address) as sock:
                try:
                    sock.sendall(frame)
                    sock.shutdown(socket.SHUT_WR)
                    said = sock.recv(1 << 16)
                except OSError:
                    continue
                assert b"{" not in said, "a stranger is told of the layout"


@pytest.mark.parametrize("scheme", ["shm://", "nixl://"])
def test_the_data_doors_open_for_no_other_deployments_key(target: Target, scheme: str) -> None:
    layout = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=1, recv_slot_bytes=1, fields=())
    hello = Hello(worker_id=target.workers[Role.ATTENTION].worker_id, epoch=Epoch(2**60), layout=layout)
    for address in data_addresses(target, scheme):
        with connect(scheme, address) as sock, pytest.raises(AntiphonError):
            connect_proven(sock, address, time.monotonic() + DEADLINE_S, target.stranger)
        with connect(scheme, address) as sock:  # nor for who does not even try
            sock.sendall(encode_greeting(Greeting(hello=hello)))
            with contextlib.suppress(OSError):  # closed with what was sent unread, perhaps before we close our half
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1 << 16) == b""


def test_the_raw_stream_answers_no_stranger(target: Target, knock: Callable[[str], grpc.Channel]) -> None:
    for address in data_addresses(target, "grpc://"):
        with knock(address) as channel:
            call = channel.stream_stream("/antiphon.transport.RawStream/Open")
            refused(lambda c=call: list(c(garbage(3), timeout=DEADLINE_S)))  # type: ignore[misc]


@pytest.mark.parametrize("scheme", ["shm://", "nixl://", "grpc://"])
def test_silent_connections_keep_nobody_out(target: Target, scheme: str) -> None:
    """More of them than a door greets at once; a real peer that comes meanwhile is linked in time."""
    for address in data_addresses(target, scheme):
        held = [connect("nixl://" if scheme == "grpc://" else scheme, address) for _ in range(100)]
        try:
            started = time.monotonic()
            if scheme != "grpc://":
                with connect(scheme, address) as sock:
                    connect_proven(sock, address, time.monotonic() + DEADLINE_S)
            assert target.ask() == target.expected
            assert time.monotonic() - started < 5.0
        finally:
            for sock in held:
                sock.close()


def test_large_frames_before_a_hello_are_not_taken(target: Target) -> None:
    process = psutil.Process(target.workers[Role.FFN].pid)
    before = process.memory_info().rss
    blob = bytes(1 << 22)
    for scheme in ("shm://", "nixl://"):
        for address in target.workers[Role.FFN].endpoint.data.split(","):
            if not address.startswith(scheme):
                continue
            for _ in range(16):
                with connect(scheme, address.removeprefix(scheme)) as sock:
                    try:
                        sock.sendall(struct.pack("<IHHII", MAGIC, HELLO_VERSION, 1, 1 << 20, 1 << 24) + blob)
                    except OSError:
                        continue
    assert process.memory_info().rss - before < 32 << 20
