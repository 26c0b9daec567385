"""antiphon k8s: what it says of a deployment, over a cluster in memory, and how it asks kubectl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from antiphon.cli.k8s import reasons, tree


def condition(type_: str, status: str, reason: str, message: str = "") -> dict[str, str]:
    return {"type": type_, "status": status, "reason": reason, "message": message}


def deployment(*conditions: dict[str, str], seen: int = 3) -> dict[str, Any]:
    status = {
        "observedGeneration": seen,
        "conditions": list(conditions),
        "pools": [{"name": "attention", "ready": 1, "target": 2}, {"name": "ffn", "ready": 1, "target": 1}],
        "url": "http://demo-http.default.svc:8000/v1",
        "model": "smol",
        "revision": "abc",
    }
    return {"metadata": {"name": "demo", "generation": 3}, "status": status}


def pod(name: str, pool: str, **status: Any) -> dict[str, Any]:
    labels = {"serving.antiphon.dev/pool": pool, "serving.antiphon.dev/deployment": "demo"}
    return {"metadata": {"name": name, "labels": labels}, "status": status}


READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [{"state": {"running": {}}}]}
NO_ROOM = {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3 nodes: Insufficient cpu."}]}
PODS = [pod("a-1", "attention", **READY), pod("a-2", "attention", phase="Pending", **NO_ROOM), pod("f-1", "ffn", **READY)]
SHORT = deployment(
    condition("Ready", "False", "Initializing", "waiting for all pools to serve"),
    condition("PoolsReady", "False", "PodsPending", "a-2: 0/3 nodes: Insufficient cpu."),
    condition("Accepted", "True", "Accepted"),
    condition("Degraded", "False", "Healthy"),
)
POOL = {
    "spec": {"pool": "ffn"},
    "status": {"conditions": [condition("ScalingLimited", "True", "GpuBudget", "4 wanted, 1 accepted")]},
}


def test_a_deployment_is_a_tree_of_pools_and_pods_with_what_is_wrong() -> None:
    assert list(tree(SHORT, [POOL], PODS)) == [
        "demo  not ready  Initializing",
        "├─ http://demo-http.default.svc:8000/v1  model smol  revision abc",
        "├─ PoolsReady is False: PodsPending: a-2: 0/3 nodes: Insufficient cpu.",
        "├─ Ready is False: Initializing: waiting for all pools to serve",
        "├─ attention  1/2 ready",
        "│  ├─ a-1  ready",
        "│  └─ a-2  unschedulable: 0/3 nodes: Insufficient cpu.",
        "└─ ffn  1/1 ready  limited: 4 wanted, 1 accepted",
        "   └─ f-1  ready",
    ]


def test_why_names_the_cause_before_what_follows_and_the_pods_and_warnings_behind_it() -> None:
    about = {"type": "Warning", "reason": "FailedScheduling", "message": "Insufficient cpu", "lastTimestamp": "2"}
    events = [
        {**about, "involvedObject": {"name": "a-2"}},
        {**about, "involvedObject": {"name": "somebody-elses"}},
        {**about, "type": "Normal", "involvedObject": {"name": "a-1"}},
    ]
    assert list(reasons(SHORT, PODS, events)) == [
        "PoolsReady is False, PodsPending: a-2: 0/3 nodes: Insufficient cpu.",
        "Ready is False, Initializing: waiting for all pools to serve",
        "pod a-2: unschedulable: 0/3 nodes: Insufficient cpu.",
        "event FailedScheduling of a-2: Insufficient cpu",
        "deploy/docs/troubleshooting.md has a heading for every reason: PodsPending",
    ]


def test_a_document_that_nobody_acts_on_leads_to_the_doctor() -> None:
    (first, *_) = reasons(deployment(condition("Ready", "True", "Ready"), seen=2), [], [])
    assert first == "the operator has not acted on this document yet (generation 3, seen 2): antiphon doctor"


def test_a_ready_deployment_is_ready() -> None:
    assert list(reasons(deployment(condition("Ready", "True", "Ready")), PODS[:1], [])) == ["it is ready"]


def verb(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The verb as a user calls it, with a kubectl that answers from what is above and tells what it was asked."""
    script = tmp_path / "kubectl"
    answers = {"llmdeployment": SHORT, "servingpools": {"items": [POOL]}, "pods": {"items": PODS}, "events": {"items": []}}
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nanswers = json.loads({json.dumps(json.dumps(answers))})\n"
        "words = [w for w in sys.argv[1:] if not w.startswith('-')]\n"
        "print(json.dumps(answers[next(w for w in words if w in answers)]) if 'get' in words else sys.argv[1:])\n"
    )
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "antiphon", "k8s", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_verbs_ask_kubectl_for_the_namespace_that_was_given(tmp_path: Path) -> None:
    told = verb(tmp_path, "why", "demo", "-n", "models")
    assert told.returncode == 1, told.stderr
    assert told.stdout.startswith("PoolsReady is False, PodsPending")
    shown = verb(tmp_path, "logs", "demo", "attention", "-n", "models", "-f", "--tail", "5")
    assert shown.returncode == 0, shown.stderr
    asked = shown.stdout
    for part in ("'--namespace', 'models'", "serving.antiphon.dev/pool=attention", "'--tail=5'", "'--follow'", "'--prefix'"):
        assert part in asked
