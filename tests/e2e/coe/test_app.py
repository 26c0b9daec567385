"""A composition door process's work, in this process: real ports, real gRPC and HTTP, experts at other real ports."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
from fastapi import FastAPI, Request

from antiphon.coe.routing.artifact import write_artifact
from antiphon.coe.serving.app import CoeConfig, run_coe
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.errors import CheckpointInvalid
from antiphon.gateway.config import BoundPorts
from antiphon.gateway.http.server import HttpServer
from antiphon.rpc.v1 import router_pb2 as pb
from antiphon.rpc.v1 import router_pb2_grpc as stubs

SUMS = "add the numbers 31 and 12 (case 1-7)"
WAIT_S = 20.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("coe") / "artifact"
    trained, _ = train(example_table(), Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    write_artifact(trained, directory, {})
    return directory


def _document(artifact: Path) -> CompositionOfExperts:
    return CompositionOfExperts.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "CompositionOfExperts",
            "metadata": {"name": "team"},
            "spec": {
                "experts": [{"name": f"model-{i}", "deploymentRef": f"d{i}"} for i in range(3)],
                "general": "model-2",
                "policy": {"name": "quality"},
                "router": {"timeoutS": 10, "artifact": {"uri": str(artifact)}},
            },
        }
    )


@asynccontextmanager
async def running(artifact: Path) -> AsyncIterator[BoundPorts]:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, str]:
        return {"model": (await request.json())["model"]}

    experts = HttpServer(app, host="127.0.0.1", port=0)
    await experts.start()
    url = f"http://127.0.0.1:{experts.port}/v1"
    config = CoeConfig(
        documents=(_document(artifact),),
        endpoints={f"d{i}": ExternalEndpoint(url=url, model=f"served-{i}") for i in range(3)},
        http_port=0,
        grpc_port=0,
        refresh_s=0.05,
    )
    stop, bound = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_coe(config, stop, on_bound=bound.set_result))
    try:
        await asyncio.wait({task, bound}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield bound.result()
    finally:
        stop.set()
        try:
            await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), WAIT_S)
        finally:
            await experts.close()


async def _eventually(true: Callable[[], "asyncio.Future[bool]"]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not await true():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


async def test_the_expert_answers_over_http(directory: Path) -> None:
    async with running(directory) as ports, httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http_port}") as client:
        body = {"model": "coe/team", "messages": [{"role": "user", "content": SUMS}]}
        answer = await client.post("/v1/chat/completions", json=body)
        models = (await client.get("/v1/models")).json()["data"]
        other = await client.post("/v1/chat/completions", json={**body, "model": "else"})
    assert answer.json() == {"model": "served-1"}
    assert answer.headers["x-antiphon-expert"] == "model-1"
    assert [model["id"] for model in models] == ["coe/team"]
    assert other.status_code == 404


async def test_grpc_routes_explains_takes_feedback_and_lists(directory: Path) -> None:
    async with running(directory) as ports, grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
        router = stubs.RouterStub(channel)
        decision = await router.Route(pb.RouteRequest(model="coe/team", prompt=SUMS), timeout=WAIT_S)
        explained = await router.Explain(pb.ExplainRequest(decision_id=decision.decision_id, policy="cheap"), timeout=WAIT_S)
        for _ in range(2):
            await router.Feedback(pb.FeedbackRequest(decision_id=decision.decision_id, score=0.9), timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as rated:
            await router.Feedback(pb.FeedbackRequest(decision_id=decision.decision_id, score=0.5), timeout=WAIT_S)
        experts = (await router.ListExperts(pb.ListExpertsRequest(), timeout=WAIT_S)).experts
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await router.Route(pb.RouteRequest(model="coe/nobody", prompt=SUMS), timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as wrong:
            await router.Explain(pb.ExplainRequest(decision_id="rd-none"), timeout=WAIT_S)
    assert (decision.expert, decision.category, decision.reason) == ("model-1", "sums", "score")
    assert explained.decision == decision
    assert explained.replay.policy == "cheap"
    assert [expert.name for expert in experts] == ["model-0", "model-1", "model-2"]
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rated.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "has the score 0.9 already" in str(rated.value.details())


async def test_a_new_artifact_is_swapped_in_and_a_broken_one_refused_while_the_old_one_serves(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "artifact"
    mine.mkdir()
    for path in directory.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    async with running(mine) as ports, grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
        router = stubs.RouterStub(channel)

        async def digest() -> str:
            answer = await router.Route(pb.RouteRequest(model="coe/team", prompt=SUMS), timeout=WAIT_S)
            return str(answer.artifact)

        first = await digest()
        manifest = json.loads((mine / "manifest.json").read_text())
        (mine / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
        await _eventually(lambda: asyncio.ensure_future(_said(caplog, "format version 99")))
        assert await digest() == first
        again, _ = train(example_table(seed=3), Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
        second = write_artifact(again, mine, {})

        async def swapped() -> bool:
            return await digest() == second

        await _eventually(lambda: asyncio.ensure_future(swapped()))
    assert first != second


async def _said(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def test_a_missing_artifact_is_refused_at_the_start_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="nowhere"):
        async with running(tmp_path / "nowhere"):
            pass
