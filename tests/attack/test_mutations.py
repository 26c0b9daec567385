"""Mutated inputs at every door and port of a running deployment: nothing ends, nothing fails inside, nothing is kept.

Some hundreds by default; ANTIPHON_ATTACK_INPUTS is their number over all doors, ANTIPHON_ATTACK_SEED their seed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2

from antiphon.apps.process.data_links import connect
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, kv_link_layout
from antiphon.connectors.headers import Header, Kind
from antiphon.core.errors import AntiphonError
from antiphon.core.identity import Identity, own_identity
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.gateway.routing.endpoints import EndpointBoard, key_of
from antiphon.rpc.credentials import TARGET_OPTIONS, _material, channel_credentials
from antiphon.rpc.endpoint_picker import PickerServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import directory_pb2, engine_pb2, experts_pb2, ext_proc_pb2, inference_pb2, steps_pb2
from antiphon.transport.base import Hello, Link, LinkLayout
from antiphon.transport.connect.hello import Greeting, encode_greeting

from .conftest import Target
from .mutations import changed_bytes, changed_json

NUM_INPUTS = int(os.environ.get("ANTIPHON_ATTACK_INPUTS", "1500"))
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280 if NUM_INPUTS <= 2000 else 0)]

SEED = int(os.environ.get("ANTIPHON_ATTACK_SEED", "7"))
DEADLINE_S = 30.0
NUM_CLIENTS = 4

CHAT: dict[str, Any] = {
    "model": "target",
    "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi", "name": "bob"}],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "logit_bias": {"5": 1.0},
    "seed": 7,
    "stop": ["zz"],
    "stop_token_ids": [3],
    "n": 1,
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"a": 1},
    "metadata": {"a": "b"},
    "cache_salt": "s",
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    ],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}
COMPLETION: dict[str, Any] = {
    "model": "target",
    "prompt": [5, 6, 7],
    "max_tokens": 2,
    "temperature": 0,
    "logprobs": 2,
    "echo": False,
    "stop": "zz",
    "logit_bias": {"5": -1},
    "seed": 1,
    "ignore_eos": False,
    "structured_outputs": {"regex": "[a-c]+"},
    "priority": 1,
    "cache_salt": "",
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": {
        "model": "target",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
        "instructions": "be",
        "max_output_tokens": 2,
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "text"}},
        "store": True,
        "previous_response_id": None,
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": "target",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "system": "s",
        "max_tokens": 2,
        "stop_sequences": ["z"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"model": "target", "messages": [{"role": "user", "content": "x"}], "system": [], "tools": []},
    "/v1/embeddings": {"model": "target", "input": ["a", "b"], "encoding_format": "float", "dimensions": 4},
    "/v1/rerank": {"model": "target", "query": "q", "documents": ["a", "b"], "top_n": 1},
    "/v1/score": {"model": "target", "text_1": "q", "text_2": ["a"]},
    "/tokenize": {"model": "target", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
    "/detokenize": {"model": "target", "tokens": [1, 2]},
}
KEEP = frozenset({"model", "messages", "prompt", "input", "max_tokens", "max_output_tokens"})
QUERIES = [
    "/v1/models/{}",
    "/v1/responses/{}",
    "/usage?from={}",
    "/usage?format={}",
    "/trace?seconds={}",
    "/web/{}",
    "/status?deployment={}",
    "/experts?deployment={}",
    "/metrics?name={}",
    "/v1/decisions/{}",
]
TEXTS = [
    "",
    "x",
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "%ff%fe",
    "%0d%0aX:1",
    "9" * 300,
    "-1",
    "nan",
    "inf",
    "2026-02-30",
    "[",
    "a" * 4000,
]


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def share(part: float) -> int:
    """Of all inputs."""
    return max(1, int(NUM_INPUTS * part))


def in_parallel(number: int, one: Callable[[int], str]) -> collections.Counter[str]:
    """What came of ``number`` inputs, a few at once."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return collections.Counter(pool.map(one, range(number)))


def said(name: str, found: collections.Counter[str]) -> None:
    """For who runs it at length."""
    print(f"\n{name}: {sum(found.values())} inputs, {dict(found.most_common(12))}")


def test_http(target: Target) -> None:
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    with httpx.Client(base_url=target.http, trust_env=False, timeout=DEADLINE_S, limits=limits) as client:

        def one(number: int) -> str:
            chance = random.Random(SEED * 10**7 + number)
            headers: dict[str, Any] = {"content-type": chance.choice(["application/json"] * 9 + ["text/plain", "", "a" * 999])}
            headers["x-request-timeout-s"] = chance.choice(["10"] * 9 + ["nan", "inf", "-1", "0", "1e400", "9" * 500, "0x1"])
            if chance.random() < 0.15:
                headers["x-request-id"] = chance.choice(["ok-1", "a" * 129, "a b", "%0d%0a", ""])
                headers["last-event-id"] = chance.choice(["0.", "1.AAAA", "9" * 90 + ".x", "-1.x", "5." + "A" * 56])
                headers["authorization"] = chance.choice(["Bearer x", "Basic eDp5", "Bearer", "Bearer " + "x" * 5000])
                headers["traceparent"] = chance.choice(["00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-x", "x" * 5000, ""])
            if chance.random() < 0.05:
                answer = client.get(chance.choice(QUERIES).format(chance.choice(TEXTS)), headers=headers)
            else:
                path = chance.choice(list(BODIES)[:2] * 3 + list(BODIES))
                body = changed_json(chance, BODIES[path], KEEP)
                if chance.random() < 0.05:
                    path = chance.choice(list(BODIES))
                answer = client.post(path, content=body, headers=headers)
            if answer.status_code >= 400 and answer.headers.get("content-type", "").startswith("application/json"):
                assert set(answer.json()) & {"error", "type"}, answer.text
            return str(answer.status_code)

        found = in_parallel(share(0.35), one)
    said("http", found)
    assert found["200"]
    assert not {status for status in found if status >= "500"} - {"503", "504"}, (
        found
    )  # no room, no time: the client's own deadline


def calls_on(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    methods: dict[str, list[bytes]],
    number: int,
    timeout_s: float = DEADLINE_S,
) -> collections.Counter[str]:
    """Statuses of calls whose bytes are near those of ``methods``."""
    channel = (
        grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials, options=TARGET_OPTIONS)
    )
    with channel:

        def one(index: int) -> str:
            chance = random.Random(SEED * 10**7 + index)
            method = chance.choice(list(methods))
            raw = chance.choice(methods[method])
            raw = raw if chance.random() < 0.05 else changed_bytes(chance, raw)
            metadata = [("traceparent", chance.choice(["x", "a" * 4000]))] if chance.random() < 0.05 else []
            try:
                for count, _ in enumerate(channel.stream_stream(method)(iter([raw]), timeout=timeout_s, metadata=metadata)):
                    if count > 20:  # a stream that goes on is a good answer
                        break
            except grpc.RpcError as error:
                return f"{method.rpartition('/')[2]} {error.code().name}"  # type: ignore[attr-defined]
            return f"{method.rpartition('/')[2]} OK"

        return in_parallel(number, one)


def failed_inside(found: collections.Counter[str], *streams: str) -> dict[str, int]:
    """Statuses that say a part of ours went wrong; of ``streams``, bytes that are no message end the stream as gRPC has it."""
    inside = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
    return {name: n for name, n in found.items() if name.endswith(inside) and name.partition(" ")[0] not in streams}


def inference_messages() -> dict[str, list[bytes]]:
    generate = inference_pb2.GenerateRequest(
        model="target", prompt="hi", num_logprobs=1, stop=["x"], request_id="a", cache_salt="s"
    )
    generate.sampling.max_tokens = 2
    generate.sampling.logit_bias[5] = 1.0
    tokens = inference_pb2.GenerateRequest(model="target")
    tokens.tokens.ids.extend([5, 6, 7])
    tokens.sampling.max_tokens = 2
    tokens.sampling.temperature = 0.5
    tokens.resume.add(index=0, token_ids=[9])
    chat = inference_pb2.GenerateRequest(model="target")
    chat.chat.messages.add(role="user", content="hi")
    chat.sampling.max_tokens = 2
    chat.tools.add(name="f", parameters='{"type": "object"}')
    chat.shape.json_schema = '{"type": "object"}'
    service = "/antiphon.rpc.v1.Inference/"
    return {
        service + "Generate": [message.SerializeToString() for message in (generate, tokens, chat)],
        service + "Embed": [inference_pb2.EmbedRequest(model="target", texts=["a"]).SerializeToString()],
        service + "Score": [inference_pb2.ScoreRequest(model="target", query="q", documents=["a"]).SerializeToString()],
        service + "ListModels": [b""],
        service + "GetStatus": [inference_pb2.GetStatusRequest(deployment="target").SerializeToString()],
        "/grpc.health.v1.Health/Check": [health_pb2.HealthCheckRequest(service="x").SerializeToString()],
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [b"\x3a\x00", b"\x22\x01x"],
        **EXPERTS,
    }


EXPERTS = {
    "/antiphon.rpc.v1.Experts/Rebalance": [
        experts_pb2.RebalanceRequest(deployment="x", placement_json="[" * 50).SerializeToString()
    ],
    "/antiphon.rpc.v1.Experts/Place": [
        experts_pb2.PlaceRequest(phase=1, number=2**32 - 1, placement_json="{}").SerializeToString(),
        experts_pb2.PlaceRequest(phase=2, number=1, placement_json='{"format": 1}').SerializeToString(),
    ],
    "/antiphon.rpc.v1.Experts/GetExpertLoad": [experts_pb2.GetExpertLoadRequest().SerializeToString()],
}


def picker_message() -> bytes:
    message = ext_proc_pb2.ProcessingRequest()
    message.request_body.body = json.dumps(CHAT).encode()
    message.request_body.end_of_stream = True
    return bytes(message.SerializeToString())


def test_public_grpc(target: Target) -> None:
    found = calls_on(target.grpc, None, inference_messages(), share(0.2))
    said("public grpc", found)
    assert found["Generate OK"] + found["GetStatus OK"]
    assert not failed_inside(found)


def test_the_endpoint_picker(target: Target) -> None:
    """On its own, as gateways outside Kubernetes have none."""

    async def run() -> collections.Counter[str]:
        picker = PickerServicer(board=EndpointBoard(), key_of=key_of, endpoints=lambda: ["10.0.0.1:80"])
        async with RpcServer([picker], host="127.0.0.1", public=True) as server:
            methods = {f"/{picker.name}/Process": [picker_message()]}
            return await asyncio.to_thread(calls_on, server.address, None, methods, share(0.05))

    found = asyncio.run(run())
    said("endpoint picker", found)
    assert found["Process OK"]
    assert not failed_inside(found, "Process")


def test_the_directory(target: Target) -> None:
    record = target.workers[Role.ATTENTION].to_json().replace("target", "zz")
    service = "/antiphon.rpc.v1.Directory/"
    messages = {
        "Register": directory_pb2.RegisterRequest(worker_info_json=record, lease_s=0.3),
        "Remove": directory_pb2.RemoveRequest(worker_id="zz/1", epoch=1),
        "ListWorkers": directory_pb2.ListWorkersRequest(deployment="zz"),
        "ClaimIndex": directory_pb2.ClaimIndexRequest(deployment="zz", pool="p", owner="o", lease_s=0.3),
        "ReleaseIndex": directory_pb2.ReleaseIndexRequest(deployment="zz", pool="p", owner="o"),
        "NextEpoch": directory_pb2.NextEpochRequest(worker_id="zz/1", after=1),
        "PutNote": directory_pb2.PutNoteRequest(topic="zz", key="k", text="t", lease_s=0.3),
        "GetNote": directory_pb2.GetNoteRequest(topic="zz", key="k"),
        "ListNotes": directory_pb2.ListNotesRequest(topic="zz"),
        "TakeBudget": directory_pb2.TakeBudgetRequest(tenant="zz", ticket="t", num_tokens=5, lease_s=0.3, num_streams=1),
        "SettleBudget": directory_pb2.SettleBudgetRequest(tenant="zz", ticket="t", num_tokens=5),
        "RenewBudgets": directory_pb2.RenewBudgetsRequest(tenant="zz", tickets=["t"], lease_s=0.3),
        "AddUse": directory_pb2.AddUseRequest(
            day="2027-01-31", batch="b", uses=[directory_pb2.UseRow(tenant="zz", num_requests=1)]
        ),
        "ListUse": directory_pb2.ListUseRequest(day="2027-01-31"),
    }
    methods = {service + name: [message.SerializeToString()] for name, message in messages.items()}
    address = target.deployment.directory_address.removeprefix("grpc://")
    found = calls_on(address, channel_credentials(), methods, share(0.12))
    said("directory", found)
    assert not failed_inside(found)
    end = time.monotonic() + 30.0  # a record whose id and lease were both changed may live a while under another name
    while len(target.directory.workers()) > len(target.workers) and time.monotonic() < end:
        for record_left in target.directory.workers():
            info = record_left.info
            if (info.worker_id, info.epoch) not in {(known.worker_id, known.epoch) for known in target.workers.values()}:
                target.directory.remove(info.worker_id, info.epoch)


@pytest.mark.parametrize("role", [Role.ATTENTION, Role.FFN, Role.PREFILL])
def test_workers_rpc(target: Target, role: Role) -> None:
    sampling = engine_pb2.EngineSampling(max_tokens=2, temperature=0.5, top_p=1, repetition_penalty=1, logit_bias={1: 2.0})
    submit = engine_pb2.SubmitCommand(
        request_id="r", prompt_token_ids=[5, 6, 7], sampling=sampling, cache_salt="s", deadline_ms=2000
    )
    methods = {
        "/antiphon.rpc.v1.Engine/Session": [
            engine_pb2.EngineCommand(submit=submit).SerializeToString(),
            engine_pb2.EngineCommand(abort=engine_pb2.AbortCommand(request_id="r")).SerializeToString(),
        ],
        **EXPERTS,
        f"/{steps_pb2.DESCRIPTOR.package}.Steps/TraceSteps": [b"", b"\x09" + b"\0" * 8],
        "/grpc.health.v1.Health/Check": [b""],
    }
    found = calls_on(target.workers[role].endpoint.rpc, channel_credentials(), methods, share(0.06))
    said(f"{role.value} rpc", found)
    assert not failed_inside(found, "Session")


def _send_changed(link: Link, chance: random.Random, kinds: list[Kind], epoch: int) -> None:
    """Some messages whose headers are nearly right, or have no right checksum at all."""
    for _ in range(chance.choice([1, 1, 3])):
        slot = link.acquire()
        if slot is None:
            return
        header = Header(
            kind=chance.choice(kinds),
            epoch=chance.choice([epoch] * 6 + [0, 2**64 - 1]),
            step=chance.choice([1, 2, 2**64 - 1]),
            layer=chance.choice([0, 0, 1, 2, 65_535]),
            ubatch=chance.choice([0, 0, 1, 65_535]),
            dtype=chance.choice([1, 1, 1, 2, 3, 255]),
            experts_per_row=chance.choice([0, 0, 0, 1, 65_535]),
            rows=chance.choice([1, 1, 2, 3, 0, 2**32 - 1]),
            num_bytes=chance.choice([256, 512, 0, 1, 2**32 - 1]),
            first=chance.choice([0, 0, 1, 2**32 - 1]),
            spare=chance.choice([0, 1000, 2**32 - 1]),
        )
        num_bytes = min(slot.data.numel(), chance.choice([header.num_bytes, header.num_bytes, 0, 1, 256, slot.data.numel()]))
        noise = torch.frombuffer(bytearray(chance.randbytes(64)), dtype=torch.uint8)
        slot.data[:64].copy_(noise[: slot.data.numel()])
        packed = header.pack() if chance.random() < 0.8 else (changed_bytes(chance, header.pack()) + bytes(64))[:64]
        link.commit(slot, packed, num_bytes)


@pytest.mark.parametrize("role", [Role.FFN, Role.PREFILL])
@pytest.mark.parametrize("scheme", ["shm://", "grpc://", "nixl://"])
def test_data_ports(target: Target, role: Role, scheme: str) -> None:
    """A peer that proves itself and has the right layout, and sends rows, KV requests and headers that are damaged."""
    info = target.workers[role]
    address = next((a for a in info.endpoint.data.split(",") if a.startswith(scheme)), None)
    if address is None:
        pytest.skip(f"no worker listens on {scheme} here")
    facts = resolve_model(target.document.spec, str(target.checkpoint), info.revision)
    if role is Role.FFN:
        layout, kinds = (
            afd_layout(facts, target.document.spec, FFNShard(), attention_end=True, ubatches=2),
            [Kind.A2F] * 6 + list(Kind),
        )
    else:
        layout, kinds = kv_link_layout(facts, decode_end=True), [Kind.PREFILL] * 4 + [Kind.PREFILL_ABORT, *Kind]
    found: collections.Counter[str] = collections.Counter()
    for number in range(share(0.15 / 6) if scheme == "shm://" else share(0.03 / 6)):
        chance = random.Random(SEED * 10**7 + number)
        hello = Hello(worker_id=WorkerId(f"target/attention/{100 + number % 50}"), epoch=Epoch(number + 1), layout=layout)
        try:
            link = connect(address, hello, DEADLINE_S)
        except AntiphonError as error:
            found[f"not linked: {type(error).__name__}"] += 1
            continue
        try:
            _send_changed(link, chance, kinds, number + 1)
            link.wait(0.02)
            answered = link.poll() is not None
            found["answered" if answered else "nothing"] += 1
        except AntiphonError as error:
            found[type(error).__name__] += 1
        finally:
            link.close()
    said(f"{role.value} {scheme}", found)
    assert found["PeerLost"] + found["nothing"] + found["answered"]


def opened_call(path: str, message: bytes) -> bytes:
    """What a gRPC client sends first (RFC 9113, RFC 7541 without its tables): preface, settings, headers and one message."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = {":method": "POST", ":scheme": "https", ":path": path, ":authority": "x", "content-type": "application/grpc"}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in {**fields, "te": "trailers"}.items()
    )
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, data)


def certified(identity: Identity, base: Path) -> ssl.SSLContext:
    """How a part of the deployment with that key connects, to whomever."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, key, chain = _material(identity)
    (base / "part.pem").write_bytes(key + chain)
    context.load_cert_chain(base / "part.pem")
    return context


def test_every_port_without_credentials(target: Target, tmp_path: Path) -> None:
    """Nearly what a part would send, from who has no key: in the clear, and under another deployment's certificate."""
    addresses = {f"rpc://{target.deployment.directory_address.removeprefix('grpc://')}"}
    for info in target.workers.values():
        addresses |= {f"rpc://{info.endpoint.rpc}", *filter(None, info.endpoint.data.split(","))}
    submit = engine_pb2.EngineCommand(submit=engine_pb2.SubmitCommand(request_id="r", prompt_token_ids=[5]))
    layout = LinkLayout(channel="afd", num_slots=2, send_slot_bytes=1, recv_slot_bytes=1, fields=())
    greeting = encode_greeting(Greeting(hello=Hello(worker_id=WorkerId("target/attention/9"), epoch=Epoch(1), layout=layout)))
    openings = [
        opened_call("/antiphon.rpc.v1.Engine/Session", submit.SerializeToString()),
        opened_call("/antiphon.rpc.v1.Directory/ListWorkers", b""),
        opened_call("/antiphon.transport.RawStream/Open", greeting),
    ]
    part, stranger = (certified(identity, tmp_path) for identity in (own_identity(), target.stranger))

    def answer(address: str, data: bytes, context: ssl.SSLContext | None) -> bytes:
        """The first that is said to who sends ``data``, where anything is."""
        scheme, _, where = address.partition("://")
        if scheme == "shm":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(DEADLINE_S)
            sock.connect(where if where.startswith("/") else f"\0{where}")
        else:
            host, _, port = where.rpartition(":")
            sock = socket.create_connection((host, int(port)), DEADLINE_S)
        try:
            if context is not None:
                sock = context.wrap_socket(sock)
            sock.sendall(data)
            if context is None:
                sock.shutdown(socket.SHUT_WR)
            return sock.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:  # of TLS, too: a stranger is shown the door
            return b""
        finally:
            sock.close()

    ports = sorted(addresses)
    for address in ports:
        if address.startswith(("rpc://", "grpc://")):
            assert answer(address, openings[0], part), "not even a part of the deployment is answered"

    def one(number: int) -> str:
        chance = random.Random(SEED * 10**7 + number)
        address = ports[number % len(ports)]
        if not address.startswith(("rpc://", "grpc://")):
            said_back = answer(address, changed_bytes(chance, chance.choice([greeting, bytes(48), b""])), None)
            assert b"{" not in said_back, "a stranger is told of the layout"
            return "raw refused"
        clear = chance.random() < 0.5
        data = chance.choice(openings)
        said_back = answer(address, changed_bytes(chance, data) if chance.random() < 0.8 else data, None if clear else stranger)
        assert not said_back or (clear and said_back[0] == 21), said_back  # TLS's alert
        return "clear refused" if clear else "stranger refused"

    found = in_parallel(max(len(ports) * 4, share(0.03)), one)
    said("without credentials", found)
    assert len(found) == 3


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_numbers_that_no_answer_could_repeat_are_refused(target: Target, path: str) -> None:
    """An answer that repeats what was asked has no JSON for 1e999."""
    for field in ("metadata", "tools"):
        body = json.dumps({**BODIES[path], "metadata": {"a": "?"}, "tools": [{"type": "function", "name": "f", "parameters": "?"}]})
        text = body.replace('"?"', "1e999" if field == "metadata" else '{"maximum": -1e999}')
        answer = httpx.post(f"{target.http}{path}", content=text, timeout=DEADLINE_S, trust_env=False)
        assert answer.status_code == 400, answer.text


def open_kinds(pid: int) -> dict[str, int]:
    """A process' descriptors by what they are."""
    kinds: collections.Counter[str] = collections.Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            kinds[os.readlink(link).partition(":[")[0] if "inode" not in os.readlink(link) else os.readlink(link)] += 1
    return dict(kinds)


def test_afterwards_everything_is_where_it_was(target: Target) -> None:
    """After all the others: blocks, slots, descriptors, threads and memory. What the first inputs make once is not what is left."""
    target.ask()

    def figures() -> dict[str, tuple[int, int]]:
        return {
            role.value: (psutil.Process(info.pid).num_fds(), psutil.Process(info.pid).num_threads())
            for role, info in target.workers.items()
        }

    end = time.monotonic() + 60.0
    while True:
        status = httpx.get(f"{target.http}/status", timeout=10, trust_env=False).json()
        loads = {worker["worker_id"]: worker["load"] for worker in status["workers"]}
        at_rest = all(
            load.get("num_running", 0) == load.get("num_waiting", 0) == 0
            and load.get("num_free_blocks", 0) == load.get("num_total_blocks", 0)
            for load in loads.values()
        )
        now = figures()
        same = all(now[role][0] <= fds + 8 and now[role][1] <= threads + 8 for role, (fds, threads) in target.figures.items())
        if (at_rest and same) or time.monotonic() > end:
            break
        time.sleep(0.2)
    assert at_rest, loads
    assert same, (target.figures, now, {role.value: open_kinds(info.pid) for role, info in target.workers.items()})
    for role, info in target.workers.items():
        grown = psutil.Process(info.pid).memory_info().rss - target.resident_bytes[role]
        was = target.figures[role.value]
        print(f"{role.value}: {grown / 2**20:.1f} MiB more than at its start; descriptors, threads {was}, then {now[role.value]}")
        assert grown < 192 * 2**20
    own = psutil.Process()  # the gateway's process is that of the attacks
    print(f"gateway and attacks: {own.memory_info().rss / 2**20:.0f} MiB, {own.num_fds()} descriptors, {own.num_threads()} threads")
    assert own.num_fds() < target.own_figures[0] + 64
    assert own.memory_info().rss - target.own_figures[1] < 512 * 2**20
