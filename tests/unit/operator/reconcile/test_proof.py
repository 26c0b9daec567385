"""READY after changes in place: true only once every part runs what was asked for, whatever KubeRay's status says meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from antiphon.core.document.part import REVISION_ANNOTATION
from antiphon_operator.kube.resources import LLM_DEPLOYMENT, RAY_SERVICE, SERVING_POOL
from antiphon_operator.reconcile.gateways import AskedGateways, GatewaySource, GatewayWord, word_in
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.render.canonical import parse_yaml
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

SETTINGS = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))


class World:
    """A deployment of two attention and two FFN workers, reconciled and KubeRay's stand-in moved in turn."""

    def __init__(self, source: GatewaySource | None = None) -> None:
        self.now_s = 1_700_000_000.0
        self.api = MemoryApi(clock=lambda: self.now_s)
        self.kuberay = KubeRay(api=self.api)
        self.source: GatewaySource = source or self.kuberay
        scaling = {"mode": "External", "minReplicas": 1, "maxReplicas": 6}
        spec = {
            "model": {"uri": "/models/smol", "name": "smol"},
            "topology": "afd",
            "pools": [
                {"name": "attention", "role": "attention", "replicas": 2, "scaling": scaling},
                {"name": "ffn", "role": "ffn", "replicas": 2, "parallelism": {"expert": 2}},
            ],
        }
        self.api.create(LLM_DEPLOYMENT, {"metadata": {"name": "demo", "namespace": "default"}, "spec": spec}, manager="kubectl")

    @property
    def live(self) -> dict[str, Any]:
        found = self.api.get(LLM_DEPLOYMENT, "default", "demo")
        assert found is not None
        return found

    def edit(self, **change: Any) -> None:
        live = self.live
        live["spec"] |= change
        self.api.update(LLM_DEPLOYMENT, live, manager="kubectl")

    def reconcile(self) -> None:
        reconciler = LLMReconciler(MemoryKube(self.api), SETTINGS, clock=lambda: self.now_s, gateways=self.source)
        asyncio.run(reconciler.reconcile("default", "demo"))

    def step(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.reconcile()
            self.check()
            self.kuberay.tick()
            self.now_s += 5

    def ready(self) -> tuple[bool, str]:
        found = {c["type"]: c for c in self.live["status"]["conditions"]}["Ready"]
        return found["status"] == "True", found["message"]

    def asked(self) -> str:
        """What parts of the document as it stands in the RayService tell."""
        (application,) = parse_yaml(self.config())["applications"]
        return str(application["args"]["document"]["metadata"]["annotations"][REVISION_ANNOTATION])

    def config(self) -> str:
        service = self.api.get(RAY_SERVICE, "default", "demo")
        assert service is not None
        return str(service["spec"]["serveConfigV2"])

    def check(self) -> None:
        """What is promised: while READY is true, every part runs what is asked for."""
        if self.ready()[0]:
            parts = self.kuberay.running(self.live["status"]["activeCluster"])
            assert parts == dict.fromkeys(("attention", "ffn", "gateway"), self.asked())
            served = parse_yaml(self.config())["applications"][0]["args"]["document"]["spec"]
            assert served["scheduler"].get("maxNumSeqs") == self.live["spec"].get("scheduler", {}).get("maxNumSeqs", 64)


def test_ready_waits_for_the_gateway_and_for_each_pool_and_says_for_which() -> None:
    world = World()
    world.step(20)
    assert world.ready()[0]
    world.edit(scheduler={"maxNumSeqs": 8})
    told = []
    for _ in range(9):
        world.step()
        told.append(world.ready())
    assert [ready for ready, _ in told] == sorted(ready for ready, _ in told), "once, and to stay"
    assert told[-1] == (True, "")
    assert any("no pod is replaced" in message for _, message in told)
    assert any("still runs" in message or "Serve is at work" in message for _, message in told)


@pytest.mark.parametrize("silent", [False, True], ids=["gateways tell", "gateways out of reach"])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_never_ready_too_early_whatever_changes_when(silent: bool, seed: int) -> None:
    """Changes in place, of sizes and of pods, some taken back before they are through; ``check`` looks after every pass."""
    world, dice = World(), random.Random(seed)
    world.kuberay.silent = silent
    changes: list[Callable[[], None]] = [
        lambda: world.edit(scheduler={"maxNumSeqs": dice.choice((4, 8))}),
        lambda: world.edit(scheduler={}),
        lambda: world.edit(kubernetes={"image": dice.choice(("antiphon/worker:1", "antiphon/worker:2"))}),
        lambda: world.edit(suspend=dice.random() < 0.3),
    ]
    for _ in range(12):
        dice.choice(changes)()
        world.step(dice.choice((1, 1, 2, 3, 8, 14)))
    world.edit(scheduler={"maxNumSeqs": 16}, suspend=False)
    world.step(40)
    assert world.ready()[0]
    assert "maxNumSeqs: 16" in world.config()


def test_a_change_taken_back_at_once_is_ready_only_when_all_parts_are_back() -> None:
    world = World()
    world.step(20)
    for back_after in range(1, 6):
        world.edit(scheduler={"maxNumSeqs": 8})
        world.step(back_after)
        world.edit(scheduler={})
        world.step(12)
        assert world.ready()[0]


def test_scaling_leaves_ready_alone_and_asks_no_gateway() -> None:
    world = World()
    world.step(20)
    asked = []

    class Listening:
        async def ask(self, urls: Any) -> dict[str, GatewayWord]:
            asked.append(urls)
            return {}

    world.source = Listening()
    world.api.merge_patch(SERVING_POOL, "default", "demo-attention", {"spec": {"replicas": 4}}, manager="kubectl")
    for _ in range(8):
        world.step()
        assert world.ready()[0]
    assert world.live["status"]["summary"] == "attn 4/4, ffn 2/2"
    assert asked == [], "what was proven once is not asked again"


def test_a_worker_that_stays_behind_keeps_it_from_being_ready_and_is_named() -> None:
    world = World()

    class Behind:
        async def ask(self, urls: Any) -> dict[str, GatewayWord]:
            words = await world.kuberay.ask(urls)
            late = {"ffn": {world.asked(): 1, "0123456789": 1}}
            return {n: GatewayWord(revision=w.revision, revisions={**w.revisions, **late}) for n, w in words.items()}

    world.source = Behind()
    world.step(20)
    ready, message = world.ready()
    assert not ready
    assert "1 workers of pool ffn still run revision 0123456789" in message


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"status": "ready", "ready_workers": 2}, None),
        ({"revision": ""}, None),
        ([], None),
        ({"revision": "a"}, GatewayWord(revision="a", revisions={})),
        ({"revision": "a", "revisions": {"ffn": {"a": 2}}}, GatewayWord(revision="a", revisions={"ffn": {"a": 2}})),
    ],
)
def test_what_a_gateway_says(body: Any, word: GatewayWord | None) -> None:
    assert word_in(body) == word


@pytest.mark.parametrize("body", [{"revision": "a", "revisions": []}, {"revision": "a", "revisions": {"ffn": {"a": "many"}}}])
def test_what_is_no_gateways_answer_is_none(body: Any) -> None:
    with pytest.raises(ValueError):
        word_in(body)


async def test_gateways_are_asked_at_once_and_those_that_do_not_answer_are_left_out() -> None:
    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"status": "no model has a ready worker", "revision": "a", "revisions": {}}).encode()
            self.send_response(503 if self.path == "/ready" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server, ThreadingHTTPServer(("127.0.0.1", 0), Door) as closed:
        Thread(target=server.serve_forever, daemon=True).start()
        gone = closed.server_address[1]
        closed.server_close()
        async with AskedGateways() as gateways:
            urls = {"up": f"http://127.0.0.1:{server.server_address[1]}", "gone": f"http://127.0.0.1:{gone}"}
            assert await gateways.ask(urls) == {"up": GatewayWord(revision="a", revisions={})}
        server.shutdown()
