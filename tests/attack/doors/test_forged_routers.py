"""Routers of a composition that have gone wrong, are of another deployment, or stand still, and who may ask a real one."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import httpx
import pytest

from antiphon.coe.serving.app import CoeConfig, run_coe
from antiphon.coe.serving.remote import routers_topic
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.identity import Identity
from antiphon.directory.memory import open_directory
from antiphon.gateway.config import BoundPorts
from antiphon.rpc.router.service import RouterServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import router_pb2 as pb
from attack.conftest import Target, second_gateway

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

LEASE_S = 600.0
TEAM = CompositionOfExperts.model_validate(
    {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "team"},
        "spec": {
            "experts": [{"name": name, "deploymentRef": "target"} for name in ("left", "right")],
            "general": "left",
            "router": {"timeoutS": 0.5},
            "auth": {"allowExpertsHeader": "x-allowed"},
        },
    }
)
ALL = {"x-allowed": "left,right"}
BODY: dict[str, Any] = {"model": "coe/team", "prompt": "abcd", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
GOOD: dict[str, Any] = {
    "decision_id": "rd-1-0123456789abcdef",
    "expert": "right",
    "reason": "score",
    "policy": "balanced",
    "alternatives": ["left"],
    "candidates": [pb.RouteCandidate(expert="left", score=0.2, total=0.1), pb.RouteCandidate(expert="right", score=0.4, total=0.4)],
}


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


@pytest.fixture(scope="module")
def door(target: Target) -> Iterator[str]:
    """A second gateway of the deployment, which serves a composition and asks its routers."""
    changes = {"compositions": (TEAM,), "deployment_models": {"target": "target"}, "routing": "replicas", "refresh_s": 0.1}
    with second_gateway(target, **changes) as bound:
        yield f"http://127.0.0.1:{bound.http_port}"


class ForgedRouter:
    """The Router service of somebody who answers what he likes."""

    def __init__(self, target: Target, identity: Identity | None = None) -> None:
        self.decision = pb.RouteDecision()
        self.stands_still = False
        self.num_asked = 0
        self._target, self._identity = target, identity
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self._do(self._start())

    def _do(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30.0)

    async def _start(self) -> str:
        self._directory = open_directory(self._target.deployment.directory_address)
        self._server = RpcServer([RouterServicer(self)], host="127.0.0.1", identity=self._identity)
        await self._server.start()
        return self._server.address

    def note(self, *addresses: str, lease_s: float = LEASE_S) -> None:
        """What gateways find in the directory; the former ones end."""
        for number, address in enumerate(addresses):
            self._do(self._directory.put_note(routers_topic("team"), f"forged:{number}", address, lease_s))

    def close(self) -> None:
        async def end() -> None:
            for owner in await self._directory.notes(routers_topic("team")):
                await self._directory.put_note(routers_topic("team"), owner, "127.0.0.1:1", 0.001)
            await self._server.close()
            await self._directory.close()

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)

    async def route(self, request: pb.RouteRequest, authorization: str | None) -> pb.RouteDecision:
        self.num_asked += 1
        if self.stands_still:
            await asyncio.sleep(60.0)  # real time: longer than anybody waits
        return self.decision

    async def explain(self, request: pb.ExplainRequest, authorization: str | None) -> pb.ExplainResponse:
        return pb.ExplainResponse(decision=self.decision, decided_s=math.nan, took_s=math.inf)

    async def feedback(self, request: pb.FeedbackRequest, authorization: str | None) -> pb.FeedbackResponse:
        return pb.FeedbackResponse()

    async def list_experts(self, request: pb.ListExpertsRequest, authorization: str | None) -> pb.ListExpertsResponse:
        return pb.ListExpertsResponse()


@pytest.fixture(scope="module")
def insider(target: Target, door: str) -> Iterator[ForgedRouter]:
    """One with the deployment's key, found by the gateway."""
    router = ForgedRouter(target)
    router.note(router.address)
    router.decision = pb.RouteDecision(**GOOD)
    with httpx.Client(base_url=door, headers=ALL, trust_env=False, timeout=60.0) as client:
        end_s = time.monotonic() + 30.0
        while (answer := client.post("/v1/completions", json=BODY)).headers["x-antiphon-reason"] != "score":
            assert time.monotonic() < end_s, answer.headers
    assert answer.headers["x-antiphon-expert"] == "right"
    yield router
    router.close()


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


def candidate(**fields: Any) -> dict[str, Any]:
    return {"candidates": [pb.RouteCandidate(expert="right", score=0.4, total=0.4), pb.RouteCandidate(expert="left", **fields)]}


FORGED: dict[str, dict[str, Any]] = {
    "nothing": dict.fromkeys(GOOD),
    "an expert that nobody has": {"expert": "nobody"},
    "no expert": {"expert": ""},
    "an alternative that nobody has": {"alternatives": ["nobody"] * 3},
    "ten thousand alternatives": {"alternatives": ["left"] * 10_000},
    "a candidate that nobody has": {"candidates": [pb.RouteCandidate(expert="x" * 1000)]},
    "a reason that there is none": {"reason": "because"},
    "a policy that there is none": {"policy": "worst"},
    "a header in the id": {"decision_id": "rd-1\r\nset-cookie: a=b\r\n\r\n<script>"},
    "a long id": {"decision_id": "r" * 100_000},
    "no id": {"decision_id": ""},
    "a long text": {"category": "c" * 200_000, "detail": "d" * 200_000},
    "numbers that are none": {"confidence": math.nan, "familiarity": math.inf},
    "a score that is none": candidate(score=math.nan),
    "a cost that is none": candidate(cost=-math.inf),
    "a total that is none": candidate(total=math.nan),
    "chances that are none": {"probabilities": {"a": math.nan}},
    "3 MiB": {"detail": "d" * (3 << 20)},
}


@pytest.mark.parametrize("name", list(FORGED))
def test_a_decision_that_can_be_none_costs_its_router_alone(target: Target, door: str, insider: ForgedRouter, name: str) -> None:
    """The request is answered as where no router is left, and the decision can be looked up."""
    fields = {key: value for key, value in {**GOOD, **FORGED[name]}.items() if value is not None}
    insider.decision = pb.RouteDecision(**fields)
    before = insider.num_asked
    with httpx.Client(base_url=door, headers=ALL, trust_env=False, timeout=60.0) as client:
        for path, body in (("/v1/completions", BODY), ("/v1/completions", {**BODY, "stream": True})):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-antiphon-expert"] == "left", answer.headers
            assert "set-cookie" not in answer.headers
            assert insider.num_asked > before, "it was not asked"
        answer = client.post("/v1/completions", json=BODY)
        assert text_of(answer) == text_of(client.post("/v1/completions", json={**BODY, "model": "target"}))
        for where in (answer.headers["x-antiphon-decision-id"], "rd-1-0123456789abcdef", "..%2f..%2fstatus", "%0d%0ax"):
            looked_up = client.get(f"/v1/decisions/{where}", params={"policy": "cheap"})
            assert looked_up.status_code in (200, 400, 404), looked_up.text


def test_an_expert_that_its_client_excluded_is_not_asked(door: str, insider: ForgedRouter) -> None:
    insider.decision = pb.RouteDecision(**GOOD)
    with httpx.Client(base_url=door, headers=ALL, trust_env=False, timeout=60.0) as client:
        answer = client.post("/v1/completions", json=BODY, headers={"x-allowed": "left"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-antiphon-expert"] == "left"


def test_routers_that_stand_still_cost_a_request_one_wait_however_many_they_are(door: str, insider: ForgedRouter) -> None:
    insider.stands_still = True
    try:
        # All are the one that stands still, by other names of its address.
        port = insider.address.rpartition(":")[2]
        insider.note(
            insider.address, *(f"{name}:{port}" for name in ("localhost", "LOCALHOST", "Localhost", "loCalhost", "localhosT"))
        )
        with httpx.Client(base_url=door, headers=ALL, trust_env=False, timeout=60.0) as client:
            time.sleep(1.0)  # real time: ten looks of the gateway into the directory
            started = time.monotonic()
            answer = client.post("/v1/completions", json=BODY)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-antiphon-reason"] == "no-router"
            assert time.monotonic() - started < 5.0
    finally:
        insider.stands_still = False


def test_a_router_of_another_deployment_decides_nothing(target: Target, door: str) -> None:
    router = ForgedRouter(target, identity=target.stranger)
    router.decision = pb.RouteDecision(**{**GOOD, "decision_id": "rd-stranger"})
    try:
        router.note(router.address, *(f"127.0.0.1:{port}" for port in range(20_000, 20_100)))
        time.sleep(0.5)  # real time: five looks of the gateway into the directory
        with httpx.Client(base_url=door, headers=ALL, trust_env=False, timeout=60.0) as client:
            for _ in range(5):
                answer = client.post("/v1/completions", json=BODY)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-antiphon-decision-id"] != "rd-stranger"
        assert not router.num_asked
    finally:
        router.close()


@pytest.fixture(params=["registered", "keyed"])
def real(request: pytest.FixtureRequest, target: Target) -> Iterator[tuple[str, BoundPorts]]:
    """A router process' work: one that gateways find, and one for users with keys."""
    is_registered = request.param == "registered"
    config = CoeConfig(
        documents=(TEAM,),
        endpoints={"target": ExternalEndpoint(url=f"{target.http}/v1", model="target")},
        directory=target.deployment.directory_address if is_registered else None,
        registers=is_registered,
        http_port=None if is_registered else 0,
        grpc_port=0,
        api_keys=frozenset() if is_registered else frozenset({"key-of-a-user"}),
    )
    bound: Future[BoundPorts] = Future()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run_coe(config, stop, on_bound=bound.set_result),), daemon=True)
    thread.start()
    yield request.param, bound.result(60.0)
    loop.call_soon_threadsafe(stop.set)
    thread.join(30.0)


def test_a_real_router_answers_no_stranger(target: Target, real: tuple[str, BoundPorts]) -> None:
    kind, ports = real
    requests = {
        "Route": pb.RouteRequest(model="coe/team", prompt="x"),
        "Explain": pb.ExplainRequest(decision_id="rd-1"),
        "Feedback": pb.FeedbackRequest(decision_id="rd-1", score=0.5),
        "ListExperts": pb.ListExpertsRequest(),
    }
    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
        for name, request in requests.items():
            for metadata in ([], [("authorization", "Bearer wrong")]):
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(f"/antiphon.rpc.v1.Router/{name}")(
                        request.SerializeToString(), metadata=metadata, timeout=15.0
                    )
                codes = (grpc.StatusCode.UNAVAILABLE,) if kind == "registered" else (grpc.StatusCode.UNAUTHENTICATED,)
                assert refused.value.code() in codes, name
    if kind == "registered":
        return
    with httpx.Client(base_url=f"http://127.0.0.1:{ports.http_port}", trust_env=False, timeout=30.0) as client:
        gets = [
            "/v1/models",
            "/v1/models/coe/team",
            "/v1/experts",
            "/v1/decisions/rd-1",
            "/v1/models/",
            "//v1/models",
            "/v1/models?x=1",
        ]
        posts = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/route", "/v1/feedback"]
        for path in gets:
            for method in ("GET", "HEAD"):
                answer = client.request(method, path)
                assert answer.status_code in (401, 404, 405), (path, answer.text)
                assert "team" not in answer.text, (path, answer.text)
        for path in posts:
            assert client.post(path, content=json.dumps(BODY)).status_code == 401, path
        named = {"authorization": "Bearer key-of-a-user", **ALL}
        answer = client.post("/v1/completions", json=BODY, headers=named)
        direct = httpx.post(f"{target.http}/v1/completions", json={**BODY, "model": "target"}, trust_env=False, timeout=30.0)
        assert text_of(answer) == text_of(direct)
        assert [card["id"] for card in client.get("/v1/models", headers=named).json()["data"]] == ["coe/team"]
