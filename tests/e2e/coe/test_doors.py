"""The composition door over a real router, in-process experts and a real external endpoint that may hang or fail."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from antiphon.coe.routing.artifact import Artifact, load_artifact, write_artifact
from antiphon.coe.routing.router import Router
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.deciders import LocalRoutes
from antiphon.coe.serving.doors.http import CoeDoor
from antiphon.coe.serving.doors.published import Decision, ExpertCard, Explained
from antiphon.coe.serving.expert_health import ExpertHealth
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.core.budget import TenantLimits
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.budgets import MemoryBudgets
from antiphon.directory.memory import MemoryDirectory
from antiphon.gateway.access.admission import Admission
from antiphon.gateway.access.keys import ApiKeys
from antiphon.telemetry import disabled

SUMS = {"messages": [{"role": "user", "content": "add the numbers 31 and 12 (case 1-7)"}]}  # model-1 is good at these


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp("coe") / "artifact"
    trained, _ = train(example_table(), Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    write_artifact(trained, directory, {})
    return load_artifact(directory)


class Experts:
    """The gateway's own models: an OpenAI door that says who it is, or refuses."""

    def __init__(self) -> None:
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/v1/models")(self.models)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        model = body["model"]
        self.asked.append(model)
        if model in self.refuse:
            return JSONResponse({"error": {"message": "no"}}, status_code=self.refuse[model])
        if body.get("stream"):

            async def events() -> AsyncIterator[str]:
                for word in ("I", " am ", model):
                    yield f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")
        return JSONResponse({"model": model, "choices": [{"message": {"content": f"I am {model}"}}]})

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "served-0", "object": "model"}]}


def _worker(model: str, **more: Any) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(f"{model}/p/0"),
        deployment=model,
        pool="p",
        role=Role.MONOLITH,
        model=model,
        revision="r",
        fingerprint="f",
        epoch=Epoch(1),
        endpoint=Endpoint(rpc="127.0.0.1:1"),
        pid=1,
        host="h",
        **{"ready": True, "max_num_seqs": 4, **more},
    )


@asynccontextmanager
async def door(
    artifact: Artifact,
    experts: Experts,
    *,
    external: str | None = None,
    external_model: str = "their-model",
    keys: tuple[str, ...] = (),
    call_tools: bool = False,
    admission: Admission | None = None,
    **spec: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, WorkerInfo]]]:
    listed: list[dict[str, Any]] = [{"name": f"model-{i}", "deploymentRef": f"d{i}", "tools": call_tools} for i in range(3)]
    if external is not None:
        listed[1] = {"name": "model-1", "external": {"url": external, "model": external_model}}
    document = CompositionOfExperts.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "CompositionOfExperts",
            "metadata": {"name": "team"},
            "spec": {"experts": listed, "general": "model-2", "policy": {"name": "quality"}, "router": {"timeoutS": 10}, **spec},
        }
    )
    workers = {f"served-{i}": _worker(f"served-{i}") for i in range(3)}
    notes = MemoryDirectory()
    health = ExpertHealth(
        document,
        models={f"model-{i}": f"served-{i}" for i in range(3)},
        endpoints={},
        workers=lambda: workers.values(),
        notes=notes,
        owner="door",
        clock=time.monotonic,
    )
    composition = Composition(document, LocalRoutes(Router(document.spec, artifact)), health, notes)
    coe = CoeDoor(experts.app, {"team": composition}, keys=ApiKeys(keys), max_request_bytes=100_000, limits=admission)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(coe), base_url="http://door") as client:
            yield client, workers
    finally:
        await coe.close()


async def _ask(client: httpx.AsyncClient, model: str = "coe/team", **more: Any) -> httpx.Response:
    headers = more.pop("headers", None)
    return await client.post("/v1/chat/completions", json={"model": model, **SUMS, **more}, headers=headers)


async def test_the_chosen_expert_answers_and_the_headers_say_who_and_why(artifact: Artifact) -> None:
    async with door(artifact, Experts()) as (client, _):
        answer = await _ask(client)
    assert answer.json()["model"] == "served-1"
    assert answer.headers["x-antiphon-expert"] == "model-1"
    assert answer.headers["x-antiphon-category"] == "sums"
    assert answer.headers["x-antiphon-reason"] == "score"
    assert float(answer.headers["x-antiphon-confidence"]) > 0.5


async def test_a_decision_is_one_of_its_tenants_requests(artifact: Artifact) -> None:
    admission = Admission(MemoryBudgets(), lambda _tenant: TenantLimits(requests_per_min=2, num_streams=1), disabled())
    async with door(artifact, Experts(), admission=admission) as (client, _):
        body = {"model": "coe/team", **SUMS}
        answers = [await client.post("/v1/route", json=body) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert (await _ask(client)).status_code == 429


async def test_streams_pass_through(artifact: Artifact) -> None:
    async with door(artifact, Experts()) as (client, _):
        answer = await _ask(client, "coe/team:cheap", stream=True)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_other_models_pass_untouched(artifact: Artifact) -> None:
    async with door(artifact, Experts()) as (client, _):
        answer = await _ask(client, "served-0")
    assert answer.json()["model"] == "served-0"
    assert "x-antiphon-expert" not in answer.headers


async def test_an_expert_that_fails_is_replaced_and_the_response_says_so(artifact: Artifact) -> None:
    experts = Experts()
    experts.refuse["served-1"] = 503
    async with door(artifact, experts, fallbacks=["model-0"]) as (client, _):
        answer = await _ask(client)
    assert answer.status_code == 200
    assert answer.headers["x-antiphon-expert"] == "model-0"
    assert answer.headers["x-antiphon-reason"] == "fallback"
    assert answer.headers["x-antiphon-fallback"] == "model-1: status 503"


async def test_when_every_expert_refuses_the_last_ones_answer_is_given(artifact: Artifact) -> None:
    experts = Experts()
    experts.refuse = {f"served-{i}": 429 for i in range(3)}
    async with door(artifact, experts) as (client, _):
        assert (await _ask(client)).status_code == 429
    assert len(experts.asked) == 3


async def test_an_expert_without_a_ready_worker_is_not_asked(artifact: Artifact) -> None:
    experts = Experts()
    async with door(artifact, experts) as (client, workers):
        workers["served-1"] = _worker("served-1", ready=False)
        answer = await _ask(client)
        state = {e["name"]: e["healthy"] for e in (await client.get("/v1/experts")).json()["data"]}
    assert "served-1" not in experts.asked
    assert answer.status_code == 200
    assert state == {"model-0": True, "model-1": False, "model-2": True}


@asynccontextmanager
async def _black_hole() -> AsyncIterator[str]:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client gives up
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


async def test_a_black_hole_is_left_after_its_time_and_then_not_asked_at_all(artifact: Artifact) -> None:
    limits = {"firstTokenTimeoutS": 0.2, "breakerFailures": 2, "breakerOpenS": 60}
    async with _black_hole() as url, door(artifact, Experts(), external=url, limits=limits) as (client, _):
        slow = [await _ask(client) for _ in range(2)]
        after = await _ask(client)
    assert {answer.headers["x-antiphon-fallback"] for answer in slow} == {"model-1: sent nothing in time"}
    assert after.status_code == 200
    assert "x-antiphon-fallback" not in after.headers  # its circuit is open: the router knows


async def test_a_black_hole_delays_nobody_else(artifact: Artifact) -> None:
    async with _black_hole() as url, door(artifact, Experts(), external=url, limits={"firstTokenTimeoutS": 20}) as (client, _):
        stuck = [asyncio.create_task(_ask(client)) for _ in range(8)]
        others = {"messages": [{"role": "user", "content": "implement a class with 12 methods (case 1-7)"}]}
        async with asyncio.timeout(10):
            answer = await client.post("/v1/chat/completions", json={"model": "coe/team", **others})
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
    assert answer.headers["x-antiphon-expert"] == "model-0"


async def test_an_unreachable_endpoint_falls_back(artifact: Artifact) -> None:
    async with door(artifact, Experts(), external="http://127.0.0.1:9/v1") as (client, _):
        answer = await _ask(client)
    assert answer.status_code == 200
    assert answer.headers["x-antiphon-fallback"] == "model-1: ConnectError"


async def test_route_decides_only_and_its_decision_can_be_explained_and_rated(artifact: Artifact) -> None:
    experts = Experts()
    async with door(artifact, experts) as (client, _):
        decision = (await client.post("/v1/route", json={"model": "coe/team", **SUMS})).json()
        explained = (await client.get(f"/v1/decisions/{decision['decision_id']}?policy=cheap")).json()
        rated = await client.post("/v1/feedback", json={"decision_id": decision["decision_id"], "score": 1})
        again = await client.post("/v1/feedback", json={"decision_id": decision["decision_id"], "score": 1})
        other = await client.post("/v1/feedback", json={"decision_id": decision["decision_id"], "score": 0.5})
        unknown = await client.get("/v1/decisions/rd-unknown")
        listed = (await client.get("/v1/experts")).json()
    for published, given in ((Decision, decision), (Explained, explained), (ExpertCard, listed["data"][0])):
        published.model_validate(given)
        assert given.keys() <= published.model_fields.keys()
    assert decision["expert"] == "model-1"
    assert rated.json() == again.json() == {"decision_id": decision["decision_id"], "score": 1.0}
    assert (rated.status_code, again.status_code, other.status_code) == (200, 200, 409)
    assert other.json()["error"]["code"] == "already_rated"
    assert "has the score 1 already" in other.json()["error"]["message"]
    assert experts.asked == []
    assert explained["candidates"] == decision["candidates"]
    assert explained["replay"]["policy"] == "cheap"
    assert rated.status_code == 200
    assert unknown.status_code == 400


async def test_compositions_are_among_the_models(artifact: Artifact) -> None:
    async with door(artifact, Experts()) as (client, _):
        names = [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
    assert names == ["served-0", "coe/team"]


@pytest.mark.parametrize(("model", "status"), [("coe/nobody", 404), ("coe/team:fancy", 404), ("coe/", 404)])
async def test_an_unknown_composition_or_policy_is_not_found(artifact: Artifact, model: str, status: int) -> None:
    async with door(artifact, Experts()) as (client, _):
        assert (await _ask(client, model)).status_code == status


async def test_an_allow_list_holds_for_every_way_to_an_expert(artifact: Artifact) -> None:
    experts = Experts()
    experts.refuse["served-2"] = 503
    async with door(artifact, experts, auth={"allowExpertsHeader": "X-Allowed"}) as (client, _):
        answer = await _ask(client, headers={"x-allowed": "model-2"})
        hidden = await _ask(client, headers={"x-allowed": "model-2", "x-antiphon-expert": "model-1"})
        nobody = await _ask(client)
    assert experts.asked == ["served-2"]  # no fallback beyond the list
    assert answer.status_code == 503
    assert hidden.status_code == 400
    assert nobody.status_code == 400


async def test_a_session_stays_at_its_expert(artifact: Artifact) -> None:
    async with door(artifact, Experts(), stickiness={"margin": 1.0}) as (client, _):
        first = await _ask(client, headers={"x-antiphon-session": "s", "x-antiphon-expert": "model-2"})
        second = await _ask(client, headers={"x-antiphon-session": "s"})
    assert first.headers["x-antiphon-reason"] == "explicit"
    assert (second.headers["x-antiphon-expert"], second.headers["x-antiphon-reason"]) == ("model-2", "sticky")


async def test_keys_are_checked_and_large_bodies_refused(artifact: Artifact) -> None:
    async with door(artifact, Experts(), keys=("secret",)) as (client, _):
        assert (await _ask(client)).status_code == 401
        assert (await _ask(client, headers={"authorization": "Bearer secret"})).status_code == 200
        assert (await client.post("/v1/route", json={"model": "coe/team"})).status_code == 401
        assert (await _ask(client, padding="x" * 200_000)).status_code == 401  # the key comes before the body
        large = await _ask(client, headers={"authorization": "Bearer secret"}, padding="x" * 200_000)
        assert large.status_code == 413

        async def silent() -> AsyncIterator[bytes]:
            raise AssertionError("the body was asked for")
            yield b""

        assert (await client.post("/v1/completions", content=silent())).status_code == 401


# ---- more than one expert

CASCADE = {
    "mode": "cascade",
    "experts": ["model-0", "model-2"],
    "accept": 0.6,
    "checks": [{"expert": "model-0", "weight": 1.0, "bias": 1.0}],
}


class SureExperts(Experts):
    """They tell how sure they are, and what they used."""

    def __init__(self, sure: dict[str, float], says: dict[str, str] | None = None) -> None:
        super().__init__()
        self.sure, self.says, self.bodies = sure, says or {}, []
        self.ids: list[str] = []

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        model = body["model"]
        self.bodies.append(body)
        if body.get("stream") or model in self.refuse:
            return await super().chat(request)
        self.asked.append(model)
        self.ids.append(request.scope["state"].get("request_id", ""))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.says.get(model, f"I am {model}")},
            "logprobs": {"content": [{"token": "I", "logprob": self.sure.get(model, 0.0)}]},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return JSONResponse({"id": "x", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage})


async def test_a_cascade_gives_the_answer_that_its_check_accepts_and_says_who_was_asked(artifact: Artifact) -> None:
    experts = SureExperts({"served-0": -5.0})
    async with door(artifact, experts, combine=CASCADE) as (client, _):
        dear = await _ask(client)
        told = await client.get(f"/v1/decisions/{dear.headers['x-antiphon-decision-id']}")
        experts.sure["served-0"] = -0.1
        cheap = await _ask(client)
        named = await _ask(client, headers={"x-antiphon-expert": "model-1"})
    assert (dear.json()["model"], dear.headers["x-antiphon-expert"]) == ("served-2", "model-2")
    assert dear.headers["x-antiphon-asked"] == "model-0 rejected 0.02; model-2 unchecked"
    assert dear.json()["usage"] == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}
    assert [(one["expert"], one["outcome"]) for one in dear.json()["antiphon"]["asked"]] == [
        ("model-0", "rejected"),
        ("model-2", "unchecked"),
    ]
    assert told.json()["asked"] == dear.json()["antiphon"]["asked"]
    assert dear.json()["choices"][0]["logprobs"] is None
    assert (cheap.json()["model"], cheap.json()["usage"]["total_tokens"]) == ("served-0", 10)
    assert experts.asked == ["served-0", "served-2", "served-0", "served-1"]
    assert "x-antiphon-combined" not in named.headers


async def test_a_cascade_streams_what_was_accepted_at_once_and_its_last_expert_as_it_speaks(artifact: Artifact) -> None:
    experts = SureExperts({"served-0": -0.1})
    async with door(artifact, experts, combine=CASCADE) as (client, _):
        accepted = await _ask(client, stream=True, stream_options={"include_usage": True})
        experts.sure["served-0"] = -5.0
        last = await _ask(client, stream=True)
    events = [json.loads(line[6:]) for line in accepted.text.split("\n\n") if line.startswith("data: {")]
    assert events[0]["choices"][0]["delta"]["content"] == "I am served-0"
    assert (events[-1]["usage"]["total_tokens"], accepted.text.endswith("data: [DONE]\n\n")) == (10, True)
    assert last.text.count("data: {") == 3
    assert last.headers["x-antiphon-expert"] == "model-2"
    assert [bool(body.get("stream")) for body in experts.bodies] == [False, False, True]


async def test_a_vote_asks_all_and_a_failure_has_no_vote(artifact: Artifact) -> None:
    experts = SureExperts({}, says={"served-0": "12", "served-1": "43", "served-2": "43."})
    vote = {"mode": "vote", "experts": ["model-0", "model-1", "model-2"], "otherwise": "decline"}
    async with door(artifact, experts, combine=vote) as (client, _):
        answer = await _ask(client)
        experts.refuse["served-2"] = 503
        declined = await _ask(client)
        several = await _ask(client, n=2)
    assert answer.json()["choices"][0]["message"]["content"] == "43"
    assert answer.headers["x-antiphon-expert"] == "model-1"
    assert declined.status_code == 422
    assert declined.json()["error"]["code"] == "declined"
    assert "model-2 failed status 503" in declined.json()["error"]["message"]
    assert "x-antiphon-combined" not in several.headers


async def test_what_no_expert_is_expected_to_answer_well_is_declined_before_anybody_is_asked(artifact: Artifact) -> None:
    experts = Experts()
    async with door(artifact, experts, gate={"declineBelow": 1.0}) as (client, _):
        answer = await _ask(client)
    assert (answer.status_code, answer.json()["error"]["code"], experts.asked) == (422, "declined", [])


async def test_the_deadline_holds_over_all_who_are_asked(artifact: Artifact) -> None:
    combine = {**CASCADE, "experts": ["model-1", "model-2"], "checks": [{"expert": "model-1", "weight": 1.0, "bias": 1.0}]}
    async with _black_hole() as url, door(artifact, Experts(), external=url, combine=combine) as (client, _):
        answer = await _ask(client, headers={"x-request-timeout-s": "0.3"})
    assert answer.status_code == 504
