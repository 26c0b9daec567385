"""What ``antiphon serve`` shows: progress, the table of what runs where, times, and what happens later (control speed).

Must not know: how anything is started.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.plan import GATEWAY, cores_of
from antiphon.apps.supervision.event_log import EventLogEntry
from antiphon.core.directory import WorkerRecord
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.gateway.config import BoundPorts
from antiphon.models.loading.progress import Amount, Pace
from antiphon.models.pooling.facts import read_pooling

PLAIN_AMOUNT_EVERY_S = 10.0  # without a terminal
_HOST_STAGES = {"checkpoint": "checkpoint", "kernels": "kernels", "ray": "Ray", "serve": "Ray Serve", "directory": "directory"}


def composition_line(composition: CompositionOfExperts) -> str:
    """What a composition is made of."""
    spec = composition.spec
    artifact = "no router artifact: rules, then the general expert" if spec.router.artifact is None else spec.router.artifact.uri
    experts = ", ".join(expert.name for expert in spec.experts)
    return f"[bold]{composition.model_name}[/] composes {escape(experts)}, policy {spec.policy.name}, router {escape(artifact)}"


def expert_table(composition: CompositionOfExperts, models: Mapping[str, str]) -> Table:
    """One line per expert: who answers for it, and what the router may assume."""
    spec = composition.spec
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in (f"EXPERT OF {composition.model_name}", "ANSWERED BY"):
        table.add_column(name, no_wrap=True)
    for name in ("ACTIVE", "CONTEXT"):
        table.add_column(name, no_wrap=True, justify="right")
    for expert in spec.experts:
        general = " (general)" if expert.name == spec.general else ""
        if expert.external is not None:
            answered = f"{expert.external.model} at {expert.external.url}"
        else:
            answered = models.get(expert.deployment_ref or "", "")
        table.add_row(
            escape(expert.name + general),
            escape(answered),
            "" if expert.active_params_b is None else f"{expert.active_params_b:g}B",
            "" if expert.context_tokens is None else str(expert.context_tokens),
        )
    return table


def first_model(serving: Serving) -> str:
    """The model to try first: a composition, or the first deployment's."""
    if serving.compositions:
        return serving.compositions[0].model_name
    return serving.deployments[0].model_name


def worker_table(documents: Sequence[LLMDeployment], records: Sequence[WorkerRecord]) -> Table:
    """One line per worker: who it is, what it holds, on how many threads and which processors, where."""
    pools = {(document.metadata.name, pool.name): pool for document in documents for pool in document.spec.pools}
    several = len(documents) > 1
    sharded = any(record.info.shard.num_shards > 1 for record in records)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("WORKER", "ROLE", *(["SHARD"] if sharded else []), "CPU"):
        table.add_column(name, no_wrap=True)
    for name in ("BLOCKS", "WEIGHTS", "PID"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("ADDRESS", no_wrap=True)
    for record in records:
        info, load = record.info, record.info.load
        pool = pools[info.deployment, info.pool]
        index = int(info.worker_id.rpartition("/")[2])
        shard = f"{info.shard.index + 1} of {info.shard.num_shards}" if info.shard.num_shards > 1 else ""
        cores = ",".join(map(str, cores_of(pool, index)))
        table.add_row(
            f"{info.deployment}/{info.pool}/{index}" if several else f"{info.pool}/{index}",
            info.role.value,
            *([shard] if sharded else []),
            f"{pool.num_threads} on {cores}" if cores else str(pool.num_threads),
            str(load.num_total_blocks) if load.num_total_blocks else "",
            f"{load.resident_weight_bytes / 1e6:.0f} MB" if load.resident_weight_bytes else "",
            str(info.pid),
            info.endpoint.rpc,
        )
    return table


def times_line(entries: Sequence[EventLogEntry], since_process_start_s: float) -> str:
    """How long the start took, by stages: those of the host, then the slowest worker's own.

    Args:
        entries: the event log.
        since_process_start_s: seconds from the start of this process to ready.
    """
    host = [f"{_HOST_STAGES.get(e.stage, e.stage)} {e.seconds:.1f}" for e in entries if e.kind == "stage" and e.subject == "host"]
    slowest: dict[str, float] = {}
    for entry in entries:
        if entry.kind == "stage" and entry.subject not in ("host", GATEWAY):
            slowest[entry.stage] = max(slowest.get(entry.stage, 0.0), entry.seconds)
    total = slowest.pop("total", None)
    inner = ", ".join(f"{name} {seconds:.1f}" for name, seconds in slowest.items())
    if total is not None:
        host.append(f"workers {total:.1f}" + (f" ({inner})" if inner else ""))
    elif inner:
        host.append(f"workers ({inner})")
    return f"Ready {since_process_start_s:.1f} s after the start of the command: " + ", ".join(host)


def endpoints(serving: Serving, ports: BoundPorts) -> Text:
    """Where clients connect, and a first request."""
    model = first_model(serving)
    tls = serving.endpoint.tls
    url = f"{'http' if tls is None else 'https'}://{ports.host}:{ports.http_port}"
    trust = "" if tls is None else f"--cacert {tls.certificate_file} "
    path, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    match "generate" if serving.compositions else _task(serving):
        case "embed":
            path, asked = "embeddings", '"input": "Hello"'
        case "rerank":
            path, asked = "rerank", '"query": "Hello", "documents": ["Hi", "Bye"]'
    body = f'{{"model": "{model}", {asked}}}'
    return Text.assemble(
        ("page  ", "bold"), f"{url}\n", ("HTTP  ", "bold"), f"{url}/v1\n", ("gRPC  ", "bold"), f"{ports.host}:{ports.grpc_port}\n",
        (f"try   curl -s {trust}{url}/v1/{path} -H 'content-type: application/json' -d '{body}'", "dim"),
    )  # fmt: skip


def _task(serving: Serving) -> str:
    document = serving.deployments[0]
    checkpoint = serving.checkpoints.get(document.metadata.name)
    facts = None if checkpoint is None else read_pooling(Path(checkpoint), document.spec.model.task)
    return "generate" if facts is None else facts.task


class Progress:
    """Says what has happened since it was last asked: on a terminal in one changing line, elsewhere line by line."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._pace = Pace(clock)
        self._told_s: dict[str, float] = {}  # when an amount was printed last, where there is no terminal
        self._spinner = Spinner("dots", style="green")
        # Without redirection: rich would show on the terminal what libraries write to the standard streams.
        self._live = Live(
            self._spinner, console=console, transient=True, redirect_stdout=False, redirect_stderr=False, refresh_per_second=10
        )
        self._num_seen = 0
        self._ready: set[str] = set()
        if console.is_terminal:
            self._live.start()

    def update(self, entries: Sequence[EventLogEntry], num_workers: int) -> None:
        """Show the entries that are new."""
        for entry in entries[self._num_seen :]:
            self._show(entry, num_workers)
        self._num_seen = len(entries)

    def say(self, text: str) -> None:
        """Show what is being done now."""
        if self._live.is_started:
            self._spinner.update(text=text)
        else:
            self._console.print(text, style="dim", highlight=False)

    def amount(self, amount: Amount) -> None:
        """Show how far something is: always on a terminal, elsewhere now and then. Any thread may call."""
        words, now_s = self._pace.words(amount), self._clock()
        if not self._live.is_started:
            if now_s - self._told_s.setdefault(amount.what, now_s) < PLAIN_AMOUNT_EVERY_S:
                return  # what takes a few seconds is no news
            self._told_s[amount.what] = now_s
        self.say(words)

    def close(self) -> None:
        """Leave the terminal clean; idempotent."""
        self._live.stop()

    def _show(self, entry: EventLogEntry, num_workers: int) -> None:
        if entry.kind == "ready" and entry.subject != GATEWAY:
            self._ready.add(entry.subject)
            self.say(f"{entry.subject} is ready ({len(self._ready)} of {num_workers})")
        elif entry.kind == "loading":
            done, total = (int(entry.facts[name]) if name in entry.facts else None for name in ("num_bytes", "total_bytes"))
            self.amount(Amount(what=f"{entry.subject} reads weights", num_bytes=done or 0, total_bytes=total))
        elif entry.kind == "started" and self._live.is_started:
            self.say(f"{entry.subject} is starting ({len(self._ready)} of {num_workers} ready)")


def later_line(entry: EventLogEntry) -> str | None:
    """What to tell about an entry that came while serving; None = nothing."""
    match entry.kind:
        case "exited":
            return f"{entry.subject} (pid {entry.pid}) is gone: {entry.message}; restarting it"
        case "ready" if entry.subject != GATEWAY:
            return f"{entry.subject} (pid {entry.pid}) is ready, epoch {entry.epoch}"
        case "ready":
            host, http_port, grpc_port = (entry.facts[name] for name in ("host", "http_port", "grpc_port"))
            return f"{GATEWAY} (pid {entry.pid}) is ready at {host}, HTTP port {http_port}, gRPC port {grpc_port}"
        case "failed":
            return f"{entry.subject}: {entry.message}"
        case _:
            return None


class ThroughputLines:
    """What gateways said about their throughput since the last look, read from their logs.

    Args:
        logs: the logs there are now.
    """

    def __init__(self, logs: Callable[[], Sequence[Path]]) -> None:
        self._logs = logs
        self._read: dict[Path, int] = {}

    def new(self) -> list[str]:
        """The lines."""
        found = []
        for log in self._logs():
            try:
                with log.open("rb") as file:
                    file.seek(self._read.get(log, 0))
                    data = file.read()
            except OSError:
                continue
            whole = data[: data.rfind(b"\n") + 1]  # the last line may still be being written
            self._read[log] = self._read.get(log, 0) + len(whole)
            found += [line for text in whole.splitlines() if (line := throughput_line(text)) is not None]
        return found


def throughput_line(text: bytes) -> str | None:
    """A line of a gateway's log in words; None = it is about something else."""
    if b'"message": "throughput"' not in text:
        return None
    try:
        said = json.loads(text)
        return (
            f"prompt {said['prompt_tokens_per_s']:.1f} tokens/s, generation {said['generation_tokens_per_s']:.1f} tokens/s, "
            f"{said['requests_per_s']:.2f} requests/s, running {said['running']}, waiting {said['waiting']}, "
            f"failed {said['failed']}, KV cache {said['kv_usage']:.0%}"
        )
    except (ValueError, KeyError, TypeError):
        return None
