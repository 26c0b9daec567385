"""The router on Ray Serve: two replicas behind one port, one of them killed under load."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from antiphon.coe.routing.artifact import load_artifact, write_artifact
from antiphon.coe.routing.decision import Question
from antiphon.coe.routing.router import Router
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.core.document.composition import CompositionOfExperts

# Runs in a process of its own: Ray is then gone for certain when the test ends.
SCRIPT = """
import json, os, signal, socket, sys, time
import httpx, psutil, ray
from ray import serve
from antiphon.apps.coe_serve import build

held = []

def held_port():
    "One that nobody else is given meanwhile: kept, but not listened at, and shared by what serves with several replicas."
    held.append(socket.socket())
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held[-1].bind(("127.0.0.1", 0))
    return held[-1].getsockname()[1]

def replicas():
    mine = psutil.Process().children(recursive=True)
    return [p.pid for p in mine if "ServeReplica:coe:router" in " ".join(p.cmdline())]

def route(url, number):
    for _ in range(100):
        try:
            with httpx.Client(timeout=5) as client:
                answer = client.post(url, json={"model": "coe/team", "prompt": f"add the numbers 31 and 12 (case 1-{number % 9})"})
            if answer.status_code == 200:
                return answer.json()["expert"]
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    return None

document = json.loads(sys.argv[1])
port = held_port()
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, configure_logging=False, log_to_driver=False)
endpoints = {f"d{i}": {"url": "http://127.0.0.1:9/v1", "model": "m"} for i in range(3)}
args = {"documents": [document], "endpoints": endpoints, "httpPort": port, "grpcPort": held_port()}
serve.run(build(args), name="coe", route_prefix=None)
url = f"http://127.0.0.1:{port}/v1/route"
before = [route(url, i) for i in range(10)]
found = replicas()
os.kill(found[0], signal.SIGKILL)
after = [route(url, i) for i in range(30)]
print("RESULT", json.dumps({"replicas": len(found), "experts": before + after}))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_no_request_is_lost_when_one_of_two_routers_is_killed(tmp_path: Path) -> None:
    artifact, _ = train(example_table(), Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    write_artifact(artifact, tmp_path / "artifact", {})
    document = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "team"},
        "spec": {
            "experts": [{"name": f"model-{i}", "deploymentRef": f"d{i}"} for i in range(3)],
            "general": "model-2",
            "policy": {"name": "quality"},
            "router": {"replicas": 2, "timeoutS": 10, "artifact": {"uri": str(tmp_path / "artifact")}},
        },
    }
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(document)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    router = Router(CompositionOfExperts.model_validate(document).spec, load_artifact(tmp_path / "artifact"))
    asked = [f"add the numbers 31 and 12 (case 1-{number % 9})" for number in (*range(10), *range(30))]
    expected = [router.route(Question(prompt=prompt)).decision.expert for prompt in asked]
    assert result == {"replicas": 2, "experts": expected}  # none lost, and every replica decides as a router here does
