"""A gateway's start and stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import CheckpointInvalid, Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.app import run_gateway
from antiphon.gateway.config import BoundPorts, GatewayConfig
from antiphon.gateway.status import revisions_of
from antiphon.telemetry import disabled


class NoWorkers:
    """A directory that can be out of reach."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    async def workers(self) -> Sequence[WorkerRecord]:
        if self.broken:
            raise Unavailable("no directory")
        return ()


def config(**changes: object) -> GatewayConfig:
    return GatewayConfig(**{"models": {}, "http_port": 0, "grpc_port": 0, "refresh_s": 0.01, **changes})  # type: ignore[arg-type]


async def test_it_opens_two_doors_and_closes_them_when_told() -> None:
    stop, bound = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(run_gateway(config(), NoWorkers(), stop, on_bound=bound.set_result, telemetry=disabled()))
    ports: BoundPorts = await asyncio.wait_for(bound, 20)
    assert ports.http_port != ports.grpc_port
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http_port}") as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
    stop.set()
    await asyncio.wait_for(serving, 20)
    for port in (ports.http_port, ports.grpc_port):
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))


async def test_it_starts_while_the_directory_is_out_of_reach_and_says_so() -> None:
    source, stop, bound = NoWorkers(broken=True), asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(run_gateway(config(), source, stop, on_bound=bound.set_result, telemetry=disabled()))
    ports: BoundPorts = await asyncio.wait_for(bound, 20)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http_port}") as http:
        assert "not answered" in (await http.get("/ready")).json()["status"]
        source.broken = False
        async with asyncio.timeout(10):
            while "not answered" in (await http.get("/ready")).json()["status"]:
                await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(serving, 20)


async def test_a_gateway_that_was_given_a_revision_tells_it_and_its_workers_also_while_it_is_not_ready() -> None:
    source, stop, bound = NoWorkers(), asyncio.Event(), asyncio.get_running_loop().create_future()
    revised = config(document_revision="abc")
    serving = asyncio.create_task(run_gateway(revised, source, stop, on_bound=bound.set_result, telemetry=disabled()))
    ports: BoundPorts = await asyncio.wait_for(bound, 20)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http_port}") as http:
        answer = await http.get("/ready")
        assert answer.status_code == 503
        assert (answer.json()["revision"], answer.json()["revisions"]) == ("abc", {})
    stop.set()
    await asyncio.wait_for(serving, 20)


def test_workers_that_take_work_are_counted_by_pool_and_revision() -> None:
    def info(pool: str, revision: str, **state: bool) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(f"d/{pool}/0"), deployment="d", pool=pool, role=Role.FFN, model="m", revision="r", fingerprint="f",
            epoch=Epoch(1), endpoint=Endpoint(rpc="h:1", data=""), pid=1, host="h", document_revision=revision,
            **{"ready": True, **state},
        )  # fmt: skip

    workers = [info("a", "new"), info("a", "new"), info("a", "old"), info("b", "old", draining=True), info("b", "new", ready=False)]
    assert revisions_of(workers) == {"a": {"new": 2, "old": 1}}


@pytest.mark.parametrize("door", ["http_port", "grpc_port"])
async def test_a_port_that_is_taken_is_said_and_leaves_nothing_open(door: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=str(port)):
            await asyncio.wait_for(run_gateway(config(**{door: port}), NoWorkers(), asyncio.Event(), telemetry=disabled()), 20)


async def test_gateways_of_one_machine_can_share_their_ports() -> None:
    stop, first = asyncio.Event(), asyncio.get_running_loop().create_future()
    shared = config(reuse_port=True)
    one = asyncio.create_task(run_gateway(shared, NoWorkers(), stop, on_bound=first.set_result, telemetry=disabled()))
    ports: BoundPorts = await asyncio.wait_for(first, 20)
    same = config(reuse_port=True, http_port=ports.http_port, grpc_port=ports.grpc_port)
    second = asyncio.get_running_loop().create_future()
    two = asyncio.create_task(run_gateway(same, NoWorkers(), stop, on_bound=second.set_result, telemetry=disabled()))
    assert await asyncio.wait_for(second, 20) == ports
    stop.set()
    await asyncio.wait_for(asyncio.gather(one, two), 20)


async def test_a_model_without_tokenizer_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no tokenizer"):
        await run_gateway(config(models={"m": tmp_path}), NoWorkers(), asyncio.Event(), telemetry=disabled())


async def test_a_directory_that_breaks_in_another_way_ends_the_gateway_with_the_reason() -> None:
    class Broken(NoWorkers):
        num_calls = 0

        async def workers(self) -> Sequence[WorkerRecord]:
            self.num_calls += 1
            if self.num_calls > 2:
                raise ZeroDivisionError("a bug")
            return ()

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(run_gateway(config(), Broken(), asyncio.Event(), telemetry=disabled()), 20)
