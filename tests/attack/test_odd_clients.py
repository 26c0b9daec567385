"""What users may be instead of clients: floods of gRPC streams, bombs, two keys at once, odd targets; a running deployment."""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from antiphon.gateway.access.key_lines import key_line
from antiphon.gateway.config import BoundPorts
from antiphon.rpc.v1 import inference_pb2 as pb

from .conftest import Target, second_gateway

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

USER, ADMIN, OLD = "user-key-of-random-text", "admin-key-of-random-text", "old-key-of-random-text"
BODY = {"model": "target", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
GENERATE = "/antiphon.rpc.v1.Inference/Generate"
MiB = 2**20
SECRETS = ("worker_id", "num_free_blocks", "revision")  # of what only admins see


@pytest.fixture(scope="module")
def keyed(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BoundPorts, Path]]:
    """A second gateway of the deployment that takes a user's and an admin's key, and its file of keys."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    lines = [str(key_line("team", "user", USER)), str(key_line("ops", "admin", ADMIN))]
    lines.append(f"{key_line('gone', 'admin', OLD)} expires=2020-01-01")
    file.write_text("\n".join(lines))
    file.chmod(0o600)
    with second_gateway(target, api_keys_file=file, metrics_access="admin") as bound:
        yield bound, file


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def said(port: int, sent: bytes) -> bytes:
    got = b""
    with socket.create_connection(("127.0.0.1", port), 20.0) as sock:
        sock.sendall(sent)
        try:
            while part := sock.recv(1 << 16):
                got += part
        except OSError:
            pass
    return got


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    more = [b"content-length: " + str(len(body)).encode()] if body else []
    return b"\r\n".join([line, b"host: x", *headers, *more, b"connection: close", b"", b""]) + body


def key(name: str) -> bytes:
    return b"authorization: Bearer " + name.encode()


def test_no_spelling_of_a_target_shows_an_admins_route_to_a_user(keyed: tuple[BoundPorts, Path]) -> None:
    port = keyed[0].http_port
    targets = [
        b"/status",
        b"/status/",
        b"//status",
        b"/%73tatus",
        b"/status%2f",
        b"/./status",
        b"/v1/../status",
        b"/v1/%2e%2e/status",
    ]
    targets += [b"http://x/status", b"http://127.0.0.1/%73tatus", b"/STATUS", b"/status;a=b", b"/status?x=/v1/models", b"/status#"]
    targets += [b"/usage", b"/experts", b"/metrics", b"/metrics/", b"//metrics", b"/v1/models/../../metrics", b"*", b"x:status"]
    tricks = [(), (b"x-forwarded-for: 127.0.0.1", b"x-original-url: /status", b"x-http-method-override: GET")]
    tricks += [(b"x-antiphon-tenant: ops", b"tenant: ops", b"x-tenant: ops")]
    for path in targets:
        for method in (b"GET", b"HEAD", b"POST"):
            for more in tricks:
                got = said(port, request(method + b" " + path + b" HTTP/1.1", key(USER), *more))
                assert not any(secret.encode() in got for secret in SECRETS), (path, got[:300])
                assert b"antiphon_" not in got, (path, got[:300])
                status = got.split(b" ")[1] if got else b"400"
                assert status in (b"200", b"400", b"401", b"403", b"404", b"405", b"307"), (path, got[:300])
                assert status != b"200" or path in (b"*",), (path, got[:300])


def test_two_keys_in_one_request_are_never_more_than_the_lesser(keyed: tuple[BoundPorts, Path]) -> None:
    """Proxies and servers differ in which of two headers counts: neither may be had twice."""
    port = keyed[0].http_port
    for first, second in ((USER, ADMIN), (ADMIN, USER), ("wrong", ADMIN), (ADMIN, "wrong"), (OLD, ADMIN)):
        for name in (b"authorization", b"Authorization", b"AUTHORIZATION"):
            headers = (key(first), name + b": Bearer " + second.encode())
            got = said(port, request(b"GET /status HTTP/1.1", *headers))
            assert got.split(b" ")[1] in (b"400", b"401", b"403"), (first, second, got[:200])
            body = json.dumps(BODY).encode()
            got = said(port, request(b"POST /v1/completions HTTP/1.1", *headers, b"content-type: application/json", body=body))
            assert got.split(b" ")[1] in (b"400", b"401"), (first, second, got[:200])
        for path in (b"/v1/completions", b"/v1/messages", b"/status"):  # routes that differ in which of the two headers counts
            both = (key(first), b"X-Api-Key: " + second.encode(), b"content-type: application/json")
            got = said(port, request(b"POST " + path + b" HTTP/1.1", *both, body=json.dumps(BODY).encode()))
            assert got.split(b" ")[1] == b"400", (path, first, second, got[:200])
    for scheme in (b"Bearer  ", b"bearer\t", b"Bearer Bearer ", b"Basic ", b"Token "):
        got = said(port, request(b"GET /status HTTP/1.1", b"authorization: " + scheme + ADMIN.encode() + b","))
        assert got.split(b" ")[1] == b"401", got[:200]
    assert said(port, request(b"GET /status HTTP/1.1", key(OLD))).split(b" ")[1] == b"401"
    assert said(port, request(b"GET /status HTTP/1.1", key(ADMIN))).split(b" ")[1] == b"200"


def test_a_key_that_is_taken_out_is_refused_and_its_open_stream_goes_on(keyed: tuple[BoundPorts, Path]) -> None:
    bound, file = keyed
    before = file.read_text()
    body = {**BODY, "max_tokens": 200, "stream": True}
    headers = {"authorization": f"Bearer {USER}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{bound.http_port}", trust_env=False, timeout=60.0, headers=headers) as client:
        try:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                file.write_text("\n".join(line for line in before.splitlines() if not line.startswith("team ")))
                end_s = time.monotonic() + 20.0
                while (seen := client.get("/v1/models").status_code) != 401 and time.monotonic() < end_s:
                    time.sleep(0.05)
                assert seen == 401
                assert "data: [DONE]" in list(lines)
        finally:
            file.write_text(before)
        end_s = time.monotonic() + 20.0
        while client.get("/v1/models").status_code != 200:
            assert time.monotonic() < end_s
            time.sleep(0.05)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """One header, neither indexed nor packed; lengths below 127."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")


def dialled(address: str, **options: Any) -> Any:
    """A channel of raw bytes, which the stubs do not know."""
    return grpc.insecure_channel(address, **options)


def asked(path: bytes = GENERATE.encode()) -> bytes:
    headers: tuple[tuple[bytes, bytes], ...] = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
    )
    headers += ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
    return b"".join(literal(name, value) for name, value in headers)


def test_streams_that_are_reset_as_soon_as_they_are_opened_cost_those_beside_nothing_for_long(target: Target) -> None:
    """HTTP/2's rapid reset (CVE-2023-44487)."""
    host, _, port = target.grpc.partition(":")
    process = psutil.Process()
    files, resident = process.num_fds(), process.memory_info().rss
    block = asked()
    for _ in range(4):
        with socket.create_connection((host, int(port)), 20.0) as sock:
            sock.settimeout(5.0)
            try:
                sock.sendall(PREFACE)
                for number in range(1, 8_000, 2):
                    sock.sendall(frame(1, 4, number, block) + frame(3, 0, number, struct.pack(">I", 8)))
            except OSError:
                pass  # it was cut off
        started = time.monotonic()
        assert target.ask() == target.expected
        assert time.monotonic() - started < 10.0
    end_s = time.monotonic() + 20.0
    while process.num_fds() > files + 8:
        assert time.monotonic() < end_s, "connections are left open"
        time.sleep(0.1)
    assert process.memory_info().rss - resident < 256 * MiB


def kept_bytes() -> int:
    """This process' memory, without what its allocator holds for the next time: a share for each thread, of any size."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def test_headers_without_end_over_grpc_are_not_kept(target: Target) -> None:
    """CONTINUATION frames for ever (CVE-2024-24549 and its like), and one field of many bytes."""
    host, _, port = target.grpc.partition(":")
    block = b"".join(frame(9, 0, 1, literal(b"x-a", b"b" * 120) * 100) for _ in range(8))
    resident = []
    for _ in range(6):
        with socket.create_connection((host, int(port)), 20.0) as sock:
            sock.settimeout(10.0)
            try:
                sock.sendall(PREFACE + frame(1, 0, 1, asked()))
                for _ in range(64 * MiB // len(block)):
                    sock.sendall(block)
            except OSError:
                pass  # it was cut off
            resident.append(kept_bytes())
    assert resident[-1] - resident[2] < 32 * MiB  # of 192 that came meanwhile
    with dialled(target.grpc) as channel:
        call = channel.unary_stream(GENERATE)
        with pytest.raises(grpc.RpcError) as refused:
            list(call(b"", metadata=[("x-large", "a" * 200_000)], timeout=20.0))
        assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(target: Target) -> None:
    before = psutil.Process().memory_info().rss
    bomb = pb.GenerateRequest(model="target", prompt="a" * (24 * MiB)).SerializeToString()
    with dialled(target.grpc, options=[("grpc.max_send_message_length", -1)], compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_stream(GENERATE)
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as refused:
                list(call(bomb, timeout=60.0))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert psutil.Process().memory_info().rss - before < 128 * MiB
    packed = zlib.compress(b"a" * 64 * MiB)
    answer = httpx.post(
        f"{target.http}/v1/completions",
        content=packed,
        headers={"content-encoding": "deflate", "content-type": "application/json"},
        trust_env=False,
        timeout=60.0,
    )
    assert answer.status_code == 413


def test_two_thousand_streams_of_one_connection_are_answered_or_refused(target: Target) -> None:
    body = pb.GenerateRequest(model="target", prompt="abc")
    body.sampling.max_tokens = 1
    raw = body.SerializeToString()
    outcomes: dict[Any, int] = {}
    with dialled(target.grpc) as channel:
        call = channel.unary_stream(GENERATE)
        calls = [call(raw, timeout=120.0) for _ in range(2_000)]
        for each in calls:
            try:
                list(each)
                code: Any = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()
            outcomes[code] = outcomes.get(code, 0) + 1
    assert set(outcomes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}, outcomes
    assert outcomes.get(grpc.StatusCode.OK, 0) > 0, outcomes


ADMINS_METHODS = {"Inference/GetStatus", "Experts/GetExpertLoad", "Experts/Rebalance", "Experts/Place"}
KEYLESS = ("grpc.health.", "grpc.reflection.")  # whether it is up, and what it speaks


def methods_of(address: str) -> list[str]:
    """Every method that a gRPC door says it has, but those that anybody may call."""
    found = []
    with dialled(address) as channel:
        base = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(base)
        for service in base.get_services():
            if not service.startswith(KEYLESS):
                found += [f"{service}/{method.name}" for method in pool.FindServiceByName(service).methods]
    return found


def test_no_method_does_more_for_a_key_than_its_scope_allows(keyed: tuple[BoundPorts, Path]) -> None:
    """Whatever the door says it has: what is added without a key's check is found, too."""
    code, address = grpc.StatusCode, f"127.0.0.1:{keyed[0].grpc_port}"
    nobodys: list[Any] = [[], [("authorization", "Bearer wrong")], [("authorization", f"Bearer {OLD}")], [("x-api-key", ADMIN)]]
    nobodys += [
        [("authorization-bin", f"Bearer {ADMIN}".encode())],
        [("authorization", ADMIN)],
        [("authorization", f"Basic {ADMIN}")],
    ]
    methods = methods_of(address)
    names = {method.removeprefix("antiphon.rpc.v1.") for method in methods}
    assert names >= ADMINS_METHODS | {"Inference/Generate", "Inference/ListModels", "Inference/Embed", "Inference/Score"}
    with dialled(address) as channel:

        def ended(method: str, metadata: Any) -> Any:
            call = channel.unary_stream(f"/{method}")(b"", metadata=metadata, timeout=20.0)
            with contextlib.suppress(grpc.RpcError):  # its code says it
                list(call)
            return call.code()

        for method in methods:
            for metadata in nobodys:
                assert ended(method, metadata) is code.UNAUTHENTICATED, (method, metadata)
            is_admins = method.removeprefix("antiphon.rpc.v1.") in ADMINS_METHODS
            got = ended(method, [("authorization", f"Bearer {USER}")])
            assert (got is code.PERMISSION_DENIED) == is_admins, (method, got)
            assert got is not code.UNAUTHENTICATED, method
            got = ended(method, [("authorization", f"Bearer {ADMIN}")])
            assert got not in (code.UNAUTHENTICATED, code.PERMISSION_DENIED), method


def test_two_keys_of_one_call_are_refused(keyed: tuple[BoundPorts, Path]) -> None:
    with dialled(f"127.0.0.1:{keyed[0].grpc_port}") as channel:
        for method in ("Inference/GetStatus", "Inference/ListModels", "Inference/Generate", "Experts/Rebalance"):
            for keys in ((USER, ADMIN), (ADMIN, USER)):
                metadata = [("authorization", f"Bearer {each}") for each in keys]
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(f"/antiphon.rpc.v1.{method}")(b"", metadata=metadata, timeout=20.0)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
