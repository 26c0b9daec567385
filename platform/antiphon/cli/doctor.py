"""``antiphon doctor``: does this machine, and the cluster it speaks to, have what Antiphon needs (control speed).

Each check says what it found and, where that is not enough, the next command. Must not know: how anything is served.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from antiphon.apps.serve.kernels import COST, kernels_missing
from antiphon.cli.serving.first_checks import LEAST_FILES
from antiphon.device.driver import Cards, look_for_cards

app = typer.Typer(add_completion=False, rich_markup_mode=None)
MIN_KUBERAY = (1, 7)  # the first whose RayService can be suspended
KINDS = ("llmdeployments", "servingpools", "compositionsofexperts", "modelartifacts")
_DEADLINE_S = 15.0

Run = Callable[[list[str]], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check; ``ok`` None = it could not be checked."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def kubectl(arguments: list[str]) -> str | None:
    """What kubectl prints, or None when it fails."""
    try:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_machine() -> list[Finding]:
    """Libraries and shared memory of this machine."""
    findings = []
    for package in ("torch", "ray", "grpcio", "safetensors"):
        try:
            findings.append(Finding(name=package, ok=True, found=importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name=package, ok=False, found="missing", advice="pip install antiphon"))
    missing = kernels_missing()
    found = "built for this processor" if missing is None else f"none, {COST}"
    findings.append(Finding(name="kernels", ok=True if missing is None else None, found=found, advice=missing or ""))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= LEAST_FILES
    findings.append(Finding(name="open files", ok=enough, found=f"{soft} of {hard}", advice=f"ulimit -n {LEAST_FILES}"))
    shm = "/dev/shm"  # noqa: S108 - the question is whether it exists
    if os.path.isdir(shm):
        free_gib = shutil.disk_usage(shm).free / 2**30
        findings.append(
            Finding(name="shared memory", ok=free_gib >= 0.25, found=f"{free_gib:.1f} GiB free", advice="enlarge /dev/shm")
        )
    return findings


def check_cards(found: Cards) -> list[Finding]:
    """The cards of this machine; none is no fault, a card that the installed torch can't use is one."""
    if not found.cards:
        advice = "pools without resources.gpu need none"
        return [Finding(name="cards", ok=None, found=f"none: {found.why_none}", advice=advice)]
    findings = [
        Finding(
            name=f"card {card.visible}",
            ok=True,
            found=f"{card.name}, {card.memory_bytes / 2**30:.0f} GiB, compute {card.capability[0]}.{card.capability[1]}, "
            f"driver {found.driver}",
        )
        for card in found.cards
    ]
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return findings
    if version.endswith("+cpu"):
        findings.append(
            Finding(name="torch on cards", ok=False, found=f"{version} computes on CPUs only", advice="install torch's CUDA build")
        )
    return findings


def check_cluster(run: Run) -> list[Finding]:
    """KubeRay, our kinds, permissions and accelerators of the cluster that kubectl speaks to."""
    version = run(["version", "-o", "json"])
    server = json.loads(version).get("serverVersion") if version else None
    if server is None:
        advice = "set KUBECONFIG, or leave this out: a laptop needs no cluster"
        return [Finding(name="cluster", ok=None, found="kubectl reaches none", advice=advice)]
    findings = [Finding(name="cluster", ok=True, found=server["gitVersion"])]
    findings += [_kuberay(run), *_kinds(run), _operator(run), *_permissions(run), _accelerators(run)]
    return findings


def _kuberay(run: Run) -> Finding:
    if run(["get", "crd", "rayservices.ray.io", "-o", "name"]) is None:
        advice = "helm install kuberay-operator kuberay/kuberay-operator"
        return Finding(name="KubeRay", ok=False, found="the kind RayService is missing", advice=advice)
    text = run(["get", "deployments", "-A", "-l", "app.kubernetes.io/name=kuberay-operator", "-o", "json"])
    items: list[Any] = json.loads(text)["items"] if text else []
    if not items:
        return Finding(name="KubeRay", ok=None, found="its operator's Deployment can't be seen", advice="check its version")
    image = items[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    tag = image.partition("@")[0].rpartition(":")[2].lstrip("v")
    try:
        numbers = tuple(int(part) for part in tag.split(".")[:2])
    except ValueError:
        return Finding(name="KubeRay", ok=None, found=image, advice="its version can't be read from the image")
    wanted = ".".join(map(str, MIN_KUBERAY))
    return Finding(name="KubeRay", ok=numbers >= MIN_KUBERAY, found=tag, advice=f"upgrade KubeRay to {wanted} or newer")


def _kinds(run: Run) -> list[Finding]:
    out = []
    for kind in KINDS:
        present = run(["get", "crd", f"{kind}.serving.antiphon.dev", "-o", "name"]) is not None
        found = "installed" if present else "missing"
        out.append(Finding(name=kind, ok=present, found=found, advice="helm install antiphon-crds helm/antiphon-crds"))
    return out


def _operator(run: Run) -> Finding:
    """Our operator: installed, and some replica of it ready."""
    text = run(["get", "deployments", "-A", "-l", "app.kubernetes.io/name=antiphon-operator", "-o", "json"])
    if text is None:
        return Finding(name="operator", ok=None, found="Deployments can't be listed", advice="ask whoever installed it")
    items: list[Any] = json.loads(text)["items"]
    if not items:
        advice = "helm install antiphon helm/antiphon --namespace antiphon-system --create-namespace"
        return Finding(name="operator", ok=False, found="not installed", advice=advice)
    metadata, wanted = items[0]["metadata"], items[0]["spec"].get("replicas", 1)
    ready = items[0].get("status", {}).get("readyReplicas", 0)
    found = f"{ready} of {wanted} replicas are ready in {metadata['namespace']}"
    advice = f"kubectl logs -n {metadata['namespace']} deployment/{metadata['name']} --previous: nothing is acted on meanwhile"
    return Finding(name="operator", ok=ready > 0, found=found, advice=advice)


def _permissions(run: Run) -> list[Finding]:
    out = []
    for verb in ("create", "delete"):
        answer = run(["auth", "can-i", verb, "llmdeployments.serving.antiphon.dev"])
        allowed = answer is not None and answer.strip() == "yes"
        advice = "ask for the role edit in your namespace"
        out.append(Finding(name=f"may {verb} llmdeployments", ok=allowed, found="yes" if allowed else "no", advice=advice))
    return out


def _accelerators(run: Run) -> Finding:
    text = run(["get", "nodes", "-o", "json"])
    if text is None:
        return Finding(name="accelerators", ok=None, found="nodes can't be listed")
    total: dict[str, int] = {}
    for node in json.loads(text)["items"]:
        for kind, amount in node["status"].get("allocatable", {}).items():
            if kind.endswith(("/gpu", "/npu", "/xpu")):
                total[kind] = total.get(kind, 0) + int(amount)
    if not total:
        return Finding(name="accelerators", ok=None, found="none", advice="pools without resources.gpu run all the same")
    return Finding(name="accelerators", ok=True, found=", ".join(f"{n} {r}" for r, n in sorted(total.items())))


def line(finding: Finding) -> str:
    """The finding as one line."""
    mark = {True: "ok  ", False: "FAIL", None: "?   "}[finding.ok]
    advice = f"  -> {finding.advice}" if finding.ok is not True and finding.advice else ""
    return f"{mark} {finding.name}: {finding.found}{advice}"


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option(help="Check the cluster that kubectl speaks to as well.")] = True,
) -> None:
    """Check this machine and cluster; exits with 1 when something needed is missing."""
    findings = [*check_machine(), *check_cards(look_for_cards())]
    if cluster:
        if shutil.which("kubectl") is None:
            findings.append(Finding(name="cluster", ok=None, found="kubectl is not installed"))
        else:
            findings += check_cluster(kubectl)
    for finding in findings:
        typer.echo(line(finding))
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
