"""Crowds at the gRPC doors of a running deployment, calls that never say anything, and garbage in a session of a part's own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from antiphon.core.ids import Role
from antiphon.gateway.access.key_lines import key_line
from antiphon.gateway.config import BoundPorts
from antiphon.rpc import credentials
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.rpc.doors import calls
from antiphon.rpc.v1 import engine_pb2, inference_pb2
from antiphon.transport.connect.address import split_host
from attack.conftest import Target, second_gateway
from attack.test_insiders import submit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

KEY = "user-key-of-random-text"
CAP = 64
SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
# HEADERS of stream 1, literal fields without an index, END_HEADERS and no END_STREAM: a call that says nothing more
FIELDS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/grpc.health.v1.Health/Check"),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]
BLOCK = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in FIELDS)
CALL = SETTINGS + len(BLOCK).to_bytes(3, "big") + b"\1\4\0\0\0\1" + BLOCK
CROWDS = {
    "silent": b"",
    "half a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 and no call": SETTINGS,
    "calls without a message": CALL,
}


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


@pytest.fixture(scope="module")
def keyed(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoundPorts]:
    """A second gateway with a key, whose gRPC door holds few connections, and waits less for messages."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(str(key_line("team", "user", KEY)))
    file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "_MAX_CONNECTIONS", CAP)
        patch.setattr(calls, "READ_S", 1.0)
        with second_gateway(target, api_keys_file=file) as bound:
            yield bound


@contextlib.contextmanager
def crowd(address: tuple[str, int], size: int, says: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, 20.0)) for _ in range(size)]
        for sock in held:
            with contextlib.suppress(OSError):  # its place is another's already
                sock.sendall(says)
        yield held


def ask(port: int, max_tokens: int = 2) -> Any:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
    request = inference_pb2.GenerateRequest(model="target", prompt="a")
    request.sampling.max_tokens = max_tokens
    request.sampling.ignore_eos = True
    raw = channel.unary_stream("/antiphon.rpc.v1.Inference/Generate", None, inference_pb2.GenerateResponse.FromString)
    metadata = (("authorization", f"Bearer {KEY}"),)
    return channel, raw(request.SerializeToString(), timeout=60.0, metadata=metadata, wait_for_ready=True)


@pytest.mark.parametrize("says", list(CROWDS))
def test_a_crowd_at_the_users_door_keeps_no_key_out_and_ends_no_stream(keyed: BoundPorts, says: str) -> None:
    before, stream = ask(keyed.grpc_port, max_tokens=400)
    with before:
        answers = [next(stream)]
        for _ in range(2):  # the second after the last has taken all there was
            with crowd(("127.0.0.1", keyed.grpc_port), 4 * CAP, CROWDS[says]):
                for _ in range(3):
                    channel, call = ask(keyed.grpc_port)
                    with channel:
                        assert list(call)[-1].WhichOneof("event") is not None
        answers += list(stream)
        assert stream.code() is grpc.StatusCode.OK
        assert sum(len(each.delta.token_ids) for each in answers) == 400


@pytest.mark.parametrize("door", ["engine", "data", "directory"])
def test_a_crowd_at_a_door_of_parts_keeps_no_part_out(target: Target, door: str) -> None:
    """More connections than these processes of their own hold."""
    attention = target.workers[Role.ATTENTION].endpoint
    data = next(each for each in target.workers[Role.FFN].endpoint.data.split(",") if each.startswith("grpc://"))
    address = {"engine": attention.rpc, "data": data, "directory": target.deployment.directory_address}[door].partition("://")
    host, port = split_host(address[2] or address[0])
    with crowd((host, port), 2600, CROWDS["half a TLS handshake"]):
        for _ in range(3):
            options = [*TARGET_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            with grpc.secure_channel(f"{host}:{port}", channel_credentials(), options=options) as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
        assert target.ask() == target.expected


def test_a_call_that_says_nothing_ends_by_itself(keyed: BoundPorts) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{keyed.grpc_port}") as channel:
        metadata = (("authorization", f"Bearer {KEY}"),)
        for method in ("antiphon.rpc.v1.Inference/Generate", "antiphon.rpc.v1.Inference/ListModels", "grpc.health.v1.Health/Watch"):
            call = channel.stream_stream(f"/{method}", None, None)(_never(), timeout=60.0, metadata=metadata)
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "no message came" in call.details()


def _never() -> Iterator[bytes]:
    """Messages that do not come while their call lives."""
    silent, other = socket.socketpair()
    with silent, other:
        silent.settimeout(5.0)
        with contextlib.suppress(OSError):
            silent.recv(1)
    yield from ()


GARBAGE = {
    "no protobuf": b"\xff" * 40,
    "a field cut short": b"\x0a\x50ab",
    "not UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
    "a group without end": b"\x0b" * 2000,
    "a length of 2**63": b"\x0a" + b"\xff" * 8 + b"\x7f",
}


@pytest.mark.parametrize("name", list(GARBAGE))
def test_garbage_in_an_engines_session_is_bad_input_and_ends_that_session_alone(target: Target, name: str) -> None:
    rpc = target.workers[Role.ATTENTION].endpoint.rpc
    with grpc.secure_channel(rpc, channel_credentials(), options=TARGET_OPTIONS) as channel:

        def session(messages: list[bytes]) -> Any:
            method = channel.stream_stream("/antiphon.rpc.v1.Engine/Session", None, engine_pb2.EngineUpdate.FromString)
            return method(iter(messages), timeout=60.0)

        good = submit("beside", ids=[5, 6, 7, 8], sampling={"max_tokens": 200, "ignore_eos": True})
        ended = channel.stream_stream("/antiphon.rpc.v1.Engine/Session", None, engine_pb2.EngineUpdate.FromString)
        open_end = socket.socketpair()

        def commands() -> Iterator[bytes]:
            yield good.SerializeToString()
            open_end[0].recv(1)

        beside: Any = ended(commands(), timeout=60.0)
        first = next(beside)
        assert first.requests
        bad = session([submit("lost", sampling={"max_tokens": 200}).SerializeToString(), GARBAGE[name]])
        with pytest.raises(grpc.RpcError) as error:
            list(bad)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value.details()
        num_tokens = sum(len(part.new_token_ids) for part in first.requests)
        for update in beside:
            num_tokens += sum(len(part.new_token_ids) for part in update.requests)
            if any(part.finish_reason for part in update.requests):
                break
        assert num_tokens == 200
        open_end[1].close()
