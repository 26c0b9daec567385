"""What a platform engineer does, in order, on a throw-away cluster: install, serve, scale, change, break, compose, delete.

    ANTIPHON_TEST_KUBECONFIG=… pytest tests/cluster -n 0 -s

The cluster has KubeRay and the two images that the charts name, and nothing of ours; it is not put back as it was. Each step prints
its seconds and the events it caused. The steps build on each other: after a failed one the rest fail at once.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

KUBECONFIG = os.environ.get("ANTIPHON_TEST_KUBECONFIG")
S3 = os.environ.get("ANTIPHON_TEST_S3")
pytestmark = [
    pytest.mark.skipif(KUBECONFIG is None, reason="ANTIPHON_TEST_KUBECONFIG names no throw-away cluster"),
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("journey"),
]
ROOT = Path(__file__).parents[2]
NAME = "smollm2"
EXAMPLE = ROOT / "deploy/examples/cpu-smollm2.yaml"
ROLES = ("attention", "ffn", "gateway")
START_S = 900.0  # weights and images may have to come first
CHANGE_S = 600.0
QUESTION = {
    "model": NAME,
    "temperature": 0,
    "max_tokens": 8,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
STREAMED = QUESTION | {"stream": True, "max_tokens": 48, "messages": [{"role": "user", "content": "Tell me about the sea."}]}
COMPOSITION = {
    "apiVersion": "serving.antiphon.dev/v1alpha1",
    "kind": "CompositionOfExperts",
    "metadata": {"name": "team"},
    "spec": {"general": "chat", "experts": [{"name": "chat", "deploymentRef": NAME}]},
}


@dataclass(slots=True)
class Traffic:
    """Streams read one after the other while something else happens."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    longest_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """kubectl and helm on the cluster, in the namespace default."""

    kubectl: Path
    helm: Path
    url: str

    def run(self, tool: Path, *arguments: str, given: str | None = None) -> str:
        environment = {**os.environ, "KUBECONFIG": str(KUBECONFIG)}
        done = subprocess.run(
            [str(tool), *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env=environment,
        )
        assert done.returncode == 0, f"{tool.name} {shlex.join(arguments)}: {done.stderr}"
        return done.stdout

    def ctl(self, *arguments: str, given: str | None = None) -> str:
        return self.run(self.kubectl, *arguments, given=given)

    def get(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self.ctl("get", *arguments, "-o", "json")))

    def conditions(self, kind: str = "llmdeployment", name: str = NAME) -> dict[str, dict[str, Any]]:
        return {c["type"]: c for c in self.get(kind, name).get("status", {}).get("conditions", ())}

    def holds(self, type_: str, status: str = "True", reason: str | None = None) -> bool:
        found = self.conditions().get(type_, {})
        return found.get("status") == status and reason in (None, found.get("reason"))

    def current(self) -> bool:
        """What was asked for last is applied, complete and serves."""
        live = self.get("llmdeployment", NAME)
        seen = live.get("status", {}).get("observedGeneration") == live["metadata"]["generation"]
        return seen and self.holds("Ready") and self.holds("Progressing", "False")

    def until(self, holds: Callable[[], bool], what: str, limit_s: float = CHANGE_S) -> None:
        deadline = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline:
                told = self.ctl("describe", "llmdeployment", NAME)[-4000:]
                pytest.fail(f"no {what} within {limit_s:.0f} s:\n{told}\n{self.ctl('get', 'pods', '-o', 'wide')}")
            time.sleep(2.0)  # a cluster is polled: there is nothing to wait on

    def patch(self, **spec: Any) -> None:
        self.ctl("patch", "llmdeployment", NAME, "--type=merge", "-p", json.dumps({"spec": spec}))

    def pods(self, pool: str) -> list[str]:
        items = self.get("pods", "-l", f"serving.antiphon.dev/deployment={NAME},serving.antiphon.dev/pool={pool}")["items"]
        return [item["metadata"]["name"] for item in items if "deletionTimestamp" not in item["metadata"]]

    def other_ready(self, pool: str, gone: str) -> bool:
        """Whether a pod has taken the place of ``gone``: in the moment after a kill READY still speaks of the one before."""
        items = self.get("pods", "-l", f"serving.antiphon.dev/deployment={NAME},serving.antiphon.dev/pool={pool}")["items"]
        ready = {
            i["metadata"]["name"]: all(c["ready"] for c in i["status"].get("containerStatuses") or [{"ready": False}])
            for i in items
        }
        return gone not in ready and any(ready.values())

    @contextmanager
    def post(self, body: dict[str, Any], service: str, limit_s: float = 180.0) -> Iterator[Any]:
        """Through the API server: a port-forward would hang on one pod."""
        path = f"/api/v1/namespaces/default/services/{service}:http/proxy/v1/chat/completions"
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            yield response

    def ask(self, service: str = f"{NAME}-http", model: str = NAME) -> str:
        with self.post({**QUESTION, "model": model}, service) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])

    def stream(self) -> str:
        """The whole text of a stream; ValueError where it ends before its end."""
        with self.post(STREAMED, f"{NAME}-http") as response:
            lines = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: ")]
        if lines[-1:] != ["[DONE]"]:
            raise ValueError(f"the stream ends with {lines[-1:]}")
        events = [json.loads(line) for line in lines[:-1]]
        return "".join(c["delta"].get("content") or "" for event in events for c in event["choices"])

    def running(self) -> list[str]:
        """The revisions that the gateway and the workers it knows say they run."""
        path = f"/api/v1/namespaces/default/services/{NAME}-http:http/proxy/ready"
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            told = json.load(response)
        return [told["revision"], *(revision for counts in told["revisions"].values() for revision in counts)]

    @staticmethod
    @contextmanager
    def proxy(kubectl: Path) -> Iterator[str]:
        environment = {**os.environ, "KUBECONFIG": str(KUBECONFIG)}
        process = subprocess.Popen([str(kubectl), "proxy", "--port=0"], stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            yield f"http://{found[0]}"
        finally:
            process.kill()
            process.wait(10)

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Two clients read streams without a pause for as long as the block takes."""
        seen, stop = Traffic(), threading.Event()

        def loop() -> None:
            while not stop.is_set():
                started = time.monotonic()
                try:
                    seen.texts.add(self.stream())
                    seen.answered += 1
                except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                    seen.failed.append(repr(error))
                    stop.wait(1.0)
                seen.longest_s = max(seen.longest_s, time.monotonic() - started)

        threads = [threading.Thread(target=loop) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join(200)
            print(f"\n{seen.answered} streams whole, {len(seen.failed)} not, longest {seen.longest_s:.0f} s {seen.failed[:3]}")

    def events(self, since: set[str]) -> list[str]:
        items = self.get("events")["items"]
        return [f"{e['type']} {e['reason']}: {e['message']}" for e in items if e["metadata"]["uid"] not in since]


@pytest.fixture(scope="module")
def cluster(kubectl: Path, helm: Path) -> Iterator[Cluster]:
    with Cluster.proxy(kubectl) as url:
        yield Cluster(kubectl=kubectl, helm=helm, url=url)


@pytest.fixture(autouse=True)
def step(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[None]:
    """Time and events of a step, on the terminal; nothing after a failed one."""
    failed = request.session.stash.setdefault(FAILED, [])
    if failed:
        pytest.fail(f"an earlier step failed: {failed[0]}")
    before = {e["metadata"]["uid"] for e in cluster.get("events")["items"]}
    started = time.monotonic()
    failed.append(request.node.name)  # taken off by a step that ends well
    yield
    if not getattr(request.node, "rep_failed", False):
        failed.clear()
    print(f"\n{request.node.name}: {time.monotonic() - started:.0f} s")
    for line in cluster.events(before):
        print(f"  {line}")


FAILED = pytest.StashKey[list[str]]()


def commands(heading: str) -> list[list[str]]:
    """The commands of the page's first block under ``heading``."""
    page = (ROOT / "deploy/docs/kubernetes.md").read_text()
    block = page.partition(f"## {heading}\n")[2].partition("```\n")[2].partition("```")[0]
    return [shlex.split(line) for line in block.splitlines() if line.strip()]


def test_the_charts_install_word_for_word(cluster: Cluster) -> None:
    for command in commands("Install"):
        if command[0] == "helm":
            cluster.run(cluster.helm, *command[1:])
    cluster.ctl("rollout", "status", "deployment/antiphon", "-n", "antiphon-system", "--timeout=180s")
    cluster.run(cluster.helm, "test", "antiphon", "-n", "antiphon-system")


def test_the_example_serves(cluster: Cluster) -> None:
    cluster.ctl("apply", "-f", str(EXAMPLE))
    cluster.until(cluster.current, "ready deployment", START_S)
    assert "Paris" in cluster.ask()


def test_it_stays_ready_under_load(cluster: Cluster) -> None:
    before = cluster.conditions()["Ready"]["lastTransitionTime"]
    with cluster.traffic() as seen:
        time.sleep(120)  # real time: it is to stay so for that long
    assert seen.failed == []
    assert seen.answered > 0
    assert cluster.conditions()["Ready"]["lastTransitionTime"] == before, "Ready did not flap"


def test_a_pool_is_scaled_through_its_servingpool(cluster: Cluster) -> None:
    cluster.ctl("scale", "servingpool", f"{NAME}-attention", "--replicas=2")
    cluster.until(lambda: "attn 2/2" in cluster.get("llmdeployment", NAME)["status"]["summary"], "second worker")
    cluster.ctl("scale", "servingpool", f"{NAME}-attention", "--replicas=1")
    cluster.until(lambda: "ScaleDownWindow" in cluster.ctl("get", "servingpools"), "reason for waiting", 60)


@pytest.mark.parametrize("strategy", ["Surge", "Recreate"])
def test_a_revision_replaces_the_other(cluster: Cluster, strategy: str) -> None:
    before = cluster.get("llmdeployment", NAME)["status"]["revision"]
    with cluster.traffic() as seen:
        cluster.patch(rollout={"strategy": strategy}, kubernetes={"drainS": 30 if strategy == "Surge" else 20})
        cluster.until(lambda: cluster.get("llmdeployment", NAME)["status"]["revision"] != before, "new revision", 120)
        cluster.until(cluster.current, f"rollout by {strategy}")
    if strategy == "Surge":
        assert seen.failed == []
    assert "Paris" in cluster.ask()


def test_a_change_in_place_is_ready_only_once_every_part_runs_it(cluster: Cluster) -> None:
    """KubeRay's first status of a new generation still speaks of what ran before."""
    before = set(cluster.running())
    pods = {pool: cluster.pods(pool) for pool in ROLES}
    cluster.patch(scheduler={"maxNumSeqs": 24})
    cluster.until(cluster.current, "change in place")
    after = set(cluster.running())
    assert len(after) == 1, f"READY while parts run {after}"
    assert not after & before, f"READY while {before} still runs"
    assert {pool: cluster.pods(pool) for pool in ROLES} == pods, "no pod is replaced"
    assert "Paris" in cluster.ask()


def test_a_bad_revision_is_given_up(cluster: Cluster) -> None:
    good = cluster.get("llmdeployment", NAME)["status"]["revision"]
    cluster.patch(rollout={"strategy": "Surge", "progressDeadlineS": 90}, kubernetes={"image": "antiphon/none:0"})
    cluster.until(lambda: cluster.holds("Progressing", "False", "RolledBack"), "rollback")
    assert cluster.get("llmdeployment", NAME)["status"]["revision"] == good
    assert cluster.holds("Ready", "False", "RolledBack")
    assert "Paris" in cluster.ask()
    cluster.patch(rollout={"progressDeadlineS": 1800}, kubernetes={"image": None})
    cluster.until(cluster.current, "good document again")
    cluster.until(lambda: len(cluster.get("rayclusters")["items"]) == 1, "end of the other cluster", 180)
    assert "Paris" in cluster.ask()


@pytest.mark.parametrize("pool", ROLES)
def test_a_killed_pod_is_replaced_and_requests_go_on(cluster: Cluster, pool: str) -> None:
    (victim, *_) = cluster.pods(pool)
    with cluster.traffic() as seen:
        cluster.ctl("delete", "pod", victim, "--grace-period=0", "--force")
        cluster.until(lambda: cluster.other_ready(pool, victim) and cluster.current(), f"new {pool} pod")
    if pool != "gateway":  # its own connections end with it
        assert seen.failed == []
    assert "Paris" in cluster.ask()


def test_a_killed_operator_comes_back_and_acts(cluster: Cluster) -> None:
    label = "app.kubernetes.io/name=antiphon-operator"
    cluster.ctl("delete", "pods", "-n", "antiphon-system", "-l", label, "--grace-period=0", "--force")
    cluster.patch(scheduler={"maxNumSeqs": 32})
    cluster.until(cluster.current, "change applied", 300)


def test_a_killed_head_ends_in_a_deployment_that_serves(cluster: Cluster) -> None:
    (head,) = cluster.pods("headgroup")
    cluster.ctl("delete", "pod", head, "--grace-period=0", "--force")
    cluster.until(lambda: cluster.pods("headgroup") not in ([], [head]) and cluster.current(), "new head")
    assert "Paris" in cluster.ask()


def test_a_drained_node_is_left_and_taken_again(cluster: Cluster) -> None:
    """Where there is another node the pods move; where there is none they wait, and READY says so."""
    (victim, *_) = cluster.pods("attention")  # after a killed head KubeRay and Ray's autoscaler may both have made one
    node = cluster.get("pod", victim)["spec"]["nodeName"]
    alone = len(cluster.get("nodes")["items"]) == 1
    ours = f"--pod-selector=serving.antiphon.dev/deployment={NAME}"
    try:
        cluster.ctl("drain", node, ours, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s")
        assert victim not in cluster.pods("attention")
        if alone:
            cluster.until(lambda: cluster.holds("Ready", "False"), "word that nothing serves", 120)
    finally:
        cluster.ctl("uncordon", node)
    cluster.until(cluster.current, "deployment on its node again")
    assert "Paris" in cluster.ask()


def test_suspend_stops_every_pod_and_resume_brings_them_back(cluster: Cluster) -> None:
    cluster.patch(suspend=True)
    everything = f"serving.antiphon.dev/deployment={NAME}"
    cluster.until(lambda: cluster.get("pods", "-l", everything)["items"] == [], "end of all pods")
    assert cluster.holds("Ready", "False", "Suspended")
    cluster.patch(suspend=False)
    cluster.until(cluster.current, "resumed deployment")
    assert "Paris" in cluster.ask()


def test_a_composition_routes_to_it(cluster: Cluster) -> None:
    cluster.ctl("apply", "-f", "-", given=json.dumps(COMPOSITION))
    cluster.until(lambda: cluster.conditions("coe", "team").get("Ready", {}).get("status") == "True", "ready composition")
    assert "Paris" in cluster.ask("team-coe", "coe/team")


@pytest.mark.skipif(S3 is None, reason="ANTIPHON_TEST_S3 names no store that pods of the cluster reach, with the bucket models")
def test_weights_come_from_an_s3_store(cluster: Cluster) -> None:
    storage = {"size": "2Gi", "accessMode": "ReadWriteOnce"}
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}}
    secret["stringData"] = {"AWS_ACCESS_KEY_ID": "journey", "AWS_SECRET_ACCESS_KEY": "journey-secret"}
    artifact: dict[str, Any] = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "stored"},
    }
    artifact["spec"] = {"uri": "s3://models/smollm2", "endpointUrl": S3, "credentialsSecret": "store", "storage": storage}
    for value in (secret, artifact):
        cluster.ctl("apply", "-f", "-", given=json.dumps(value))
    cluster.until(lambda: cluster.get("modelartifact", "stored").get("status", {}).get("phase") == "Cached", "weights")
    status = cluster.get("modelartifact", "stored")["status"]
    assert status["digest"] == cluster.get("modelartifact", NAME)["status"]["digest"], "the same files"
    cluster.ctl("delete", "modelartifact", "stored", "--timeout=60s")


def test_deleting_leaves_nothing_even_when_we_are_gone(cluster: Cluster) -> None:
    cluster.ctl("delete", "coe", "team", "--timeout=120s")
    cluster.ctl("delete", "llmdeployment", NAME, "--timeout=120s")
    cluster.until(
        lambda: cluster.get("pods,rayclusters,servingpools", "-l", "app.kubernetes.io/name=antiphon")["items"] == [], "end"
    )
    cluster.run(cluster.helm, "uninstall", "antiphon", "-n", "antiphon-system", "--wait")
    cluster.ctl("delete", "modelartifact", NAME, "--timeout=60s")
    cluster.ctl("wait", "--for=delete", f"persistentvolumeclaim/{NAME}", "--timeout=60s")  # the cluster collects it after its owner
