"""``antiphon k8s``: a deployment on a cluster as a tree, why it is not ready, a pool's logs, a port to it (control speed).

All of it is asked of kubectl, with whatever cluster and namespace that is set to. Must not know: how the operator decides.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from antiphon.core.errors import InvalidInput, Unavailable

app = typer.Typer(
    add_completion=False, help="Daily work with deployments on a cluster.", no_args_is_help=True, rich_markup_mode=None
)

GROUP = "serving.antiphon.dev"
_DEADLINE_S = 30.0
# In the order in which one waits for the other: the first that is not as it should be is why.
_ORDER = ("Accepted", "ModelReady", "PoolsReady", "RouterReady", "ScalingReady", "Ready")
_BAD_WHEN_TRUE = ("Degraded", "Stalled", "RollbackInProgress", "ScalingLimited")
_MOST_EVENTS = 5

Object = Mapping[str, Any]
Name = Annotated[str, typer.Argument(help="Name of the LLMDeployment.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Its namespace; without it kubectl's own.")]


def _kubectl(arguments: Sequence[str], namespace: str | None) -> list[str]:
    return ["kubectl", *([] if namespace is None else ["--namespace", namespace]), *arguments]


def _read(arguments: Sequence[str], namespace: str | None) -> Object:
    """What kubectl prints as JSON.

    Raises:
        Unavailable: there is no kubectl, or it fails; the message has its words.
    """
    command = _kubectl([*arguments, "-o", "json"], namespace)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except FileNotFoundError as error:
        raise Unavailable("kubectl is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"kubectl gave no answer within {_DEADLINE_S:.0f} s") from error
    if done.returncode != 0:
        raise Unavailable(done.stderr.strip() or "kubectl failed")
    return dict(json.loads(done.stdout))


def conditions_of(value: Object) -> dict[str, Object]:
    """The conditions of an object by their types."""
    return {c["type"]: c for c in value.get("status", {}).get("conditions", ())}


def pod_state(pod: Object) -> str:
    """A pod in a word or two, as ``kubectl get pods`` has it, with what holds it back."""
    status = pod.get("status", {})
    if "deletionTimestamp" in pod["metadata"]:
        return "stopping"
    for condition in status.get("conditions", ()):
        if condition.get("reason") == "Unschedulable":
            return f"unschedulable: {condition.get('message', '')}"
    restarts = 0
    for container in status.get("containerStatuses", ()):
        restarts += container.get("restartCount", 0)
        for state in ("waiting", "terminated"):
            found = container.get("state", {}).get(state)
            if found:
                return (
                    f"{found.get('reason', state)}: {found['message']}" if found.get("message") else str(found.get("reason", state))
                )
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
    again = f", restarted {restarts} times" if restarts else ""
    return f"{'ready' if ready else str(status.get('phase', 'unknown')).lower()}{again}"


def tree(live: Object, pools: Sequence[Object], pods: Sequence[Object]) -> Iterator[str]:
    """The deployment, what is not as it should be, its pools and their pods, a line each."""
    status, conditions = live.get("status", {}), conditions_of(live)
    ready = conditions.get("Ready", {})
    word = "ready" if ready.get("status") == "True" else "not ready"
    yield f"{live['metadata']['name']}  {word}  {ready.get('reason', 'not seen yet')}"
    if status.get("url"):
        yield f"├─ {status['url']}  model {status.get('model', '')}  revision {status.get('revision', '')}"
    for condition in wrong(live):
        yield f"├─ {condition['type']} is {condition['status']}: {condition['reason']}: {condition.get('message', '')}".rstrip(": ")
    sizes = {pool["name"]: pool for pool in status.get("pools", ())}
    limits = {pool["spec"]["pool"]: conditions_of(pool).get("ScalingLimited", {}) for pool in pools}
    groups: dict[str, list[Object]] = {name: [] for name in sizes}
    for pod in pods:
        groups.setdefault(pod["metadata"].get("labels", {}).get(f"{GROUP}/pool", "?"), []).append(pod)
    for index, (name, members) in enumerate(groups.items()):
        last = index == len(groups) - 1
        size = sizes.get(name)
        figures = f"  {size['ready']}/{size['target']} ready" if size else ""
        limit = limits.get(name, {})
        limited = f"  limited: {limit['message']}" if limit.get("status") == "True" else ""
        yield f"{'└' if last else '├'}─ {name}{figures}{limited}"
        for position, pod in enumerate(members):
            branch = "└" if position == len(members) - 1 else "├"
            yield f"{' ' if last else '│'}  {branch}─ {pod['metadata']['name']}  {pod_state(pod)}"


def wrong(live: Object) -> list[Object]:
    """Conditions that are not as they should be, causes before what follows from them."""
    found = conditions_of(live)
    bad = [found[name] for name in _ORDER if name in found and found[name]["status"] != "True"]
    return bad + [found[name] for name in _BAD_WHEN_TRUE if name in found and found[name]["status"] == "True"]


def reasons(live: Object, pods: Sequence[Object], events: Sequence[Object]) -> Iterator[str]:
    """Why the deployment is not ready, or that it is; and the last warnings about it and its pods."""
    generation, seen = live["metadata"].get("generation", 0), live.get("status", {}).get("observedGeneration", 0)
    if seen < generation:
        yield f"the operator has not acted on this document yet (generation {generation}, seen {seen}): antiphon doctor"
    causes = wrong(live)
    if not causes and seen >= generation:
        yield "it is ready"
        return
    for condition in causes:
        yield f"{condition['type']} is {condition['status']}, {condition['reason']}: {condition.get('message', '')}".rstrip(": ")
    for pod in pods:
        state = pod_state(pod)
        if not state.startswith("ready"):
            yield f"pod {pod['metadata']['name']}: {state}"
    names = {live["metadata"]["name"], *(pod["metadata"]["name"] for pod in pods)}
    warnings = [e for e in events if e.get("type") == "Warning" and e.get("involvedObject", {}).get("name") in names]
    for event in sorted(warnings, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))[-_MOST_EVENTS:]:
        yield f"event {event.get('reason', '')} of {event['involvedObject']['name']}: {event.get('message', '')}"
    if causes:
        yield f"deploy/docs/troubleshooting.md has a heading for every reason: {causes[0]['reason']}"


def _pods(name: str, namespace: str | None, pool: str | None = None) -> list[Object]:
    selector = f"{GROUP}/deployment={name}" + ("" if pool is None else f",{GROUP}/pool={pool}")
    return list(_read(["get", "pods", "-l", selector], namespace)["items"])


@app.command()
def status(name: Name, namespace: Namespace = None) -> None:
    """Show a deployment as a tree: what is wrong, its pools, their pods."""
    live = _read(["get", "llmdeployment", name], namespace)
    pools = _read(["get", "servingpools", "-l", f"{GROUP}/deployment={name}"], namespace)["items"]
    for text in tree(live, pools, _pods(name, namespace)):
        typer.echo(text)


@app.command()
def why(name: Name, namespace: Namespace = None) -> None:
    """Say why a deployment is not ready, causes first; exits with 1 when it is not."""
    live = _read(["get", "llmdeployment", name], namespace)
    lines = list(reasons(live, _pods(name, namespace), _read(["get", "events"], namespace)["items"]))
    for text in lines:
        typer.echo(text)
    if lines != ["it is ready"]:
        raise typer.Exit(1)


@app.command()
def logs(
    name: Name,
    pool: Annotated[str, typer.Argument(help="Name of a pool, or gateway, or headgroup.")],
    namespace: Namespace = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Lines of each pod to begin with.")] = 100,
) -> None:
    """Show the logs of all pods of a pool, each line with its pod."""
    if not _pods(name, namespace, pool):
        known = sorted({str(p["metadata"]["labels"].get(f"{GROUP}/pool")) for p in _pods(name, namespace)})
        raise InvalidInput(f"deployment {name} has no pods in {pool!r}; it has {', '.join(known) or 'none at all'}", "pool")
    selector = f"{GROUP}/deployment={name},{GROUP}/pool={pool}"
    options = ["--prefix", f"--tail={tail}", "--max-log-requests=50", *(["--follow"] if follow else [])]
    _become(["logs", "-l", selector, *options], namespace)


@app.command()
def forward(
    name: Name,
    namespace: Namespace = None,
    http_port: Annotated[int, typer.Option(min=1, max=65_535, help="Port here for HTTP.")] = 8000,
) -> None:
    """Open a port on this machine to a deployment's HTTP API, until Ctrl-C."""
    service = _read(["get", "service", f"{name}-http"], namespace)
    port = service["spec"]["ports"][0]["port"]
    typer.echo(f"http://127.0.0.1:{http_port}/v1")
    _become(["port-forward", f"service/{name}-http", f"{http_port}:{port}"], namespace)


def _become(arguments: Sequence[str], namespace: str | None) -> None:
    """Go on as kubectl: signals and the exit status are its own."""
    command = _kubectl(arguments, namespace)
    os.execvp(command[0], command)  # noqa: S606 - the list is of our own making
