"""What a user does on a cluster, on a real API server: the charts, the operator's own process, kubectl apply, get and delete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from antiphon.core.errors import Unavailable
from antiphon_operator.testing.ray_kinds import ray_definitions
from antiphon_operator.testing.real_api import ApiServer, find_assets

ASSETS = find_assets()
pytestmark = [
    pytest.mark.skipif(ASSETS is None, reason="KUBEBUILDER_ASSETS names no directory with etcd and kube-apiserver"),
    pytest.mark.cluster,
]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy/examples/smollm2-afd.yaml"
NAMESPACE = "antiphon-system"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/antiphon-operator"
RAY_SERVICES = "/apis/ray.io/v1/namespaces/default/rayservices"
DEADLINE_S = 120.0  # a killed leader's lease stands for a minute
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """An API server on which the charts are installed; ``operator_config`` logs in as the chart's service account."""

    server: ApiServer
    kubectl: Path
    config: Path
    operator_config: Path
    next_port: Callable[[], int]

    def ctl(self, *arguments: str) -> str:
        """kubectl's output; fails the test when kubectl does."""
        command = [
            str(self.kubectl),
            "--kubeconfig",
            str(self.config),
            "--cache-dir",
            str(self.config.parent / "cache"),
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def operator(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The operator as the chart's container starts it; killed when the test is through with it."""
        arguments = [
            "run",
            "--kubeconfig",
            str(self.operator_config),
            "--own-namespace",
            NAMESPACE,
            "--port",
            str(self.next_port()),
        ]
        environment = {**os.environ, "ANTIPHON_IMAGE": "antiphon/worker:1"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "antiphon_operator", *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def eventually(read: Callable[[], Found | None], what: str, log: Path) -> Found:
    """What ``read`` gives once it is not None; it may be refused while things start."""
    deadline = time.monotonic() + DEADLINE_S
    last: object = None
    while time.monotonic() < deadline:
        try:
            found = read()
        except Unavailable as error:
            last, found = error, None
        if found is not None:
            return found
        time.sleep(0.2)
    told = log.read_text()[-4000:] if log.exists() else "nothing yet"
    pytest.fail(f"no {what} within {DEADLINE_S} s ({last}); the operator said:\n{told}")


@pytest.fixture(scope="module")
def cluster(helm: Path, kubectl: Path, tmp_path_factory: pytest.TempPathFactory, next_port: Callable[[], int]) -> Iterator[Cluster]:
    assert ASSETS is not None
    directory = tmp_path_factory.mktemp("cluster")
    with ApiServer(ASSETS) as server:
        server.install(ray_definitions())
        config, operator_config = directory / "admin.yaml", directory / "operator.yaml"
        config.write_text(server.kubeconfig())
        made = Cluster(server=server, kubectl=kubectl, config=config, operator_config=operator_config, next_port=next_port)
        made.ctl("create", "namespace", NAMESPACE)
        for chart in ("antiphon-crds", "antiphon"):
            # Not every build of an API server tells its types, which helm install asks for; it checks what it gets all the same.
            command = [str(helm), "template", "antiphon", str(ROOT / "helm" / chart), "--namespace", NAMESPACE, "--no-hooks"]
            rendered = directory / f"{chart}.yaml"
            with rendered.open("wb") as out:
                subprocess.run(command, stdout=out, timeout=DEADLINE_S, check=True)
            made.ctl("apply", "--server-side", "--validate=false", "-f", str(rendered))
            made.ctl("wait", "--for=condition=Established", "customresourcedefinitions", "--all", f"--timeout={DEADLINE_S:g}s")
        account = server.request("GET", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts")["items"][0]["metadata"]["name"]
        value = yaml.safe_load(server.kubeconfig())
        value["users"][0]["user"]["token"] = made.ctl("create", "token", account, "-n", NAMESPACE).strip()
        operator_config.write_text(yaml.safe_dump(value))
        yield made


def deployment(cluster: Cluster) -> dict[str, Any]:
    return dict(json.loads(cluster.ctl("get", "llmdeployments", "smollm2", "-o", "json")))


def test_a_document_is_applied_told_in_a_line_and_deleted_with_the_charts_rights_alone(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "operator.log"
    with cluster.operator(log) as operator:
        cluster.ctl("apply", "--validate=false", "-f", str(EXAMPLE))

        def accepted() -> dict[str, Any] | None:
            conditions = deployment(cluster).get("status", {}).get("conditions", [])
            return {c["type"]: c for c in conditions} if conditions else None

        found = eventually(accepted, "status", log)
        assert found["Accepted"]["status"] == "True", found["Accepted"]
        assert found["Ready"]["status"] != "True", "nothing runs here"
        eventually(lambda: cluster.server.request("GET", f"{RAY_SERVICES}/smollm2"), "RayService", log)
        header, line = cluster.ctl("get", "llmdeployments").splitlines()
        assert header.split()[:1] == ["NAME"]
        assert line.split()[0] == "smollm2"
        # The reconciler writes pools before the service, one after the other: whoever sees the service sees both pools.
        assert len(cluster.ctl("get", "servingpools").splitlines()) == 3, "a line of names, and two pools"
        cluster.ctl("delete", "-f", str(EXAMPLE), "--wait=false")
        with pytest.raises(Unavailable, match="404"):
            cluster.server.request("GET", "/apis/serving.antiphon.dev/v1alpha1/namespaces/default/llmdeployments/smollm2")
        operator.send_signal(signal.SIGTERM)
        assert operator.wait(DEADLINE_S) == 0, log.read_text()[-4000:]
    told = log.read_text()
    assert "forbidden" not in told.lower(), told
    assert "Traceback" not in told, told


def test_a_second_operator_takes_over_when_the_first_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    first_log, second_log = tmp_path / "first.log", tmp_path / "second.log"

    def holder() -> str | None:
        value = cluster.server.request("GET", LEASE)["spec"].get("holderIdentity")
        return str(value) if value else None

    def another(than: set[str]) -> str | None:
        now = holder()
        return now if now and now not in than else None

    try:
        before = {holder() or ""}
    except Unavailable:  # nobody ever led
        before = set()
    with cluster.operator(first_log) as first:
        leader = eventually(lambda: another(before), "leader", first_log)
        with cluster.operator(second_log):
            first.kill()
            eventually(lambda: another({leader}), "second leader", second_log)
            cluster.ctl("apply", "--validate=false", "-f", str(EXAMPLE))
            eventually(lambda: cluster.server.request("GET", f"{RAY_SERVICES}/smollm2"), "RayService", second_log)
    cluster.ctl("delete", "-f", str(EXAMPLE), "--wait=false")
