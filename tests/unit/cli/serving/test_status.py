"""``antiphon status``: the tables, and the verb against a real gRPC server."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.cli.serving.status import app
from antiphon.cli.serving.status_table import duration, render, size, state_of
from antiphon.client import CompositionStatus, ExpertStanding, GatewayStatus, PoolStatus, ServiceStatus, WorkerStatus
from antiphon.core.errors import Unauthenticated
from antiphon.core.worker_info import WorkerLoad
from antiphon.rpc.inference import CallInfo, InferenceServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import inference_pb2 as pb

ATTENTION = WorkerStatus(
    worker_id="demo/att/0",
    deployment="demo",
    pool="att",
    role="attention",
    model="m",
    revision="r",
    fingerprint="f",
    epoch=3,
    rpc_address="10.0.0.1:7000",
    data_address="grpc://10.0.0.1:7001",
    pid=7,
    host="h",
    shard="",
    ready=True,
    draining=False,
    message="",
    lease_remaining_s=4.25,
    connected=True,
    num_requests=2,
    load=WorkerLoad(
        num_waiting=1,
        num_running=2,
        num_free_blocks=25,
        num_total_blocks=100,
        num_prompt_tokens=1234,
        num_generation_tokens=56,
        resident_weight_bytes=300 * 2**20,
    ),
)
FFN = replace(
    ATTENTION,
    worker_id="demo/ffn/1",
    pool="ffn",
    role="ffn",
    shard="1/2",
    connected=None,
    lease_remaining_s=None,
    load=WorkerLoad(num_ffn_rows=9876),
)
STATUS = ServiceStatus(
    gateway=GatewayStatus(version="0.1.0", uptime_s=3725.0, num_requests=2, draining=False),
    pools=(
        PoolStatus(
            deployment="demo", name="att", role="attention", num_workers=2, num_ready=1, num_waiting=1, num_running=2, kv_usage=0.75
        ),
    ),
    workers=(ATTENTION, FFN),
)


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("message", ["", "waits for a shard of its pool, which has not come back since"])
def test_a_narrow_terminal_shows_fewer_columns_and_none_cut(width: int, message: str) -> None:
    worker = replace(ATTENTION, worker_id="smollm2/attention/0", epoch=1795861423, rpc_address="127.0.0.1:41234", message=message)
    out = io.StringIO()
    Console(file=out, width=width).print(render(replace(STATUS, workers=(worker, FFN))))
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for whole in ("smollm2/attention/0", "ready", "75%", "1,234 in, 56 out", "left out, for want of width: EPOCH"):
        assert whole in text


def lines(status: ServiceStatus) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=220).print(render(status))
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]


def test_a_worker_is_a_line_with_its_state_lease_load_and_address() -> None:
    found = lines(STATUS)
    assert [
        "demo/att/0", "attention", "ready", "-", "3", "4.2 s", "1", "2", "75%", "1,234 in, 56 out", "300 MiB", "10.0.0.1:7000",
    ] in found  # fmt: skip
    assert ["demo/ffn/1", "ffn", "ready", "1/2", "3", "-", "0", "0", "-", "9,876 rows", "0 B", "10.0.0.1:7000"] in found


def test_a_pool_is_a_line_with_how_many_are_ready() -> None:
    assert ["demo", "att", "attention", "1/2", "1", "2", "75%"] in lines(STATUS)


def test_the_gateway_says_how_long_it_is_up() -> None:
    assert lines(STATUS)[0] == ["gateway 0.1.0: serving, up 1 h 2 min, 2 requests in flight"]


def test_no_workers_are_said_in_words() -> None:
    assert lines(replace(STATUS, workers=()))[-1] == ["no workers are registered"]


def test_a_reason_gets_a_column_only_when_there_is_one() -> None:
    waiting = replace(FFN, ready=False, message="waits for [weights]")
    assert "waits for [weights]" in lines(replace(STATUS, workers=(waiting,)))[-1]
    assert not any("WHY" in line for line in lines(STATUS))


def test_a_composition_is_a_line_with_its_experts_and_who_is_down() -> None:
    expert = ExpertStanding(
        name="chat", external=False, general=True, healthy=True, resident=True, num_waiting=0, expected_wait_s=0.0
    )
    down = replace(expert, name="code", general=False, healthy=False)
    composition = CompositionStatus(
        name="coe/team", state="degraded", message="code is down", experts=(expert, down), num_fallbacks=3, last_fallback=""
    )
    found = lines(replace(STATUS, compositions=(composition,)))
    assert found[-1] == ["coe/team", "degraded", "chat (general), code (down)", "3", "code is down"]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "ready"),
        ({"ready": False}, "starting"),
        ({"draining": True}, "draining"),
        ({"connected": False}, "no session"),
        ({"connected": None}, "ready"),
    ],
)
def test_a_worker_is_in_one_of_four_states(change: dict[str, bool | None], state: str) -> None:
    assert state_of(replace(ATTENTION, **change)) == state


def test_sizes_and_durations_are_short() -> None:
    assert [size(n) for n in (0, 1023, 1024, 2**30, 2**41)] == ["0 B", "1023 B", "1 KiB", "1 GiB", "2.0 TiB"]
    assert [duration(s) for s in (5.9, 65, 3600, 90_000)] == ["5 s", "1 min 5 s", "1 h 0 min", "1 d 1 h"]


class Gateway:
    """Knows one pool; wants a key."""

    async def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        raise NotImplementedError
        yield

    async def list_models(self, request: pb.ListModelsRequest, call: CallInfo) -> pb.ListModelsResponse:
        raise NotImplementedError

    async def get_status(self, request: pb.GetStatusRequest, call: CallInfo) -> pb.GetStatusResponse:
        if call.metadata.get("authorization") != "Bearer key":
            raise Unauthenticated("a key is needed")
        worker = pb.WorkerStatus(worker_id=f"{request.deployment or 'all'}/p/0", role="prefill", ready=True)
        composition = pb.CompositionStatus(name="coe/team", state="ready", experts=[pb.ExpertStanding(name="chat", healthy=True)])
        return pb.GetStatusResponse(gateway=pb.GatewayStatus(version="9"), workers=[worker], compositions=[composition])


@pytest.fixture
def address() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> RpcServer:
        server = RpcServer([InferenceServicer(Gateway())], host="127.0.0.1", public=True)
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield server.address
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_the_verb_prints_what_the_gateway_says(address: str) -> None:
    result = CliRunner().invoke(app, ["--endpoint", address, "--api-key", "key", "-d", "demo"])
    assert result.exit_code == 0
    assert "demo/p/0" in result.output


def test_json_is_the_whole_status(address: str) -> None:
    result = CliRunner().invoke(app, ["-e", address, "--json"], env={"ANTIPHON_API_KEY": "key"})
    assert json.loads(result.output)["workers"][0]["worker_id"] == "all/p/0"


def test_an_error_is_the_trees(address: str) -> None:
    result = CliRunner().invoke(app, ["-e", address])
    assert isinstance(result.exception, Unauthenticated)
