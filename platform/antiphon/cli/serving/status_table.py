"""A gateway's status as tables for people (control speed). Must not know: where the status came from."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from antiphon.client import CompositionStatus, PoolStatus, ServiceStatus, WorkerStatus

_STYLES = {"ready": "green", "draining": "yellow", "starting": "yellow", "no session": "red"}
_COMPOSITION_STYLES = {"ready": "green", "degraded": "yellow", "unavailable": "red"}

_LEFT_OUT_IN_ORDER = ("#EPOCH", "ADDRESS", "ROLE", "#LEASE", "#WEIGHTS", "SHARD")
_LEAST_WHY_WIDTH = 24


def render(status: ServiceStatus) -> RenderableType:
    """The gateway's line, the pools, the workers and the compositions."""
    gateway = status.gateway
    state = "draining" if gateway.draining else "serving"
    head = Text(f"gateway {gateway.version}: {state}, up {duration(gateway.uptime_s)}, {gateway.num_requests} requests in flight")
    below: list[RenderableType] = [Text("no workers are registered")]
    if status.workers:
        below = [Text(), _pools(status.pools), Text(), _Workers(status.workers)]
    if status.compositions:
        below += [Text(), _compositions(status.compositions)]
    return Group(head, *below)


def _pools(pools: tuple[PoolStatus, ...]) -> Table:
    table = _table("DEPLOYMENT", "POOL", "ROLE", "#READY", "#WAITING", "#RUNNING", "#KV")
    for pool in pools:
        ready = Text(f"{pool.num_ready}/{pool.num_workers}", "green" if pool.num_ready == pool.num_workers else "yellow")
        kv = "-" if pool.role == "ffn" else f"{pool.kv_usage:.0%}"
        table.add_row(pool.deployment, pool.name, pool.role, ready, str(pool.num_waiting), str(pool.num_running), kv)
    return table


class _Workers:
    """A line for each worker. Where a terminal is too narrow for all columns, whole ones are left out, and named below."""

    def __init__(self, workers: tuple[WorkerStatus, ...]) -> None:
        self._rows = [_worker_cells(worker) for worker in workers]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [name for name in self._rows[0] if name != "WHY" or any(row["WHY"] for row in self._rows)]
        left_out: list[str] = []
        for name in _LEFT_OUT_IN_ORDER:
            if self._width(console, names) <= options.max_width:
                break
            names.remove(name)
            left_out.append(name.removeprefix("#"))
        yield self._table(names)
        if left_out:
            yield Text(f"left out, for want of width: {', '.join(left_out)}", style="dim")

    def _table(self, names: list[str]) -> Table:
        table = _table(*names)
        for row in self._rows:
            table.add_row(*(row[name] for name in names))
        if names[-1] == "WHY":
            table.columns[-1].overflow = "fold"
        return table

    def _width(self, console: Console, names: list[str]) -> int:
        """Columns of the terminal that these take whole; WHY goes on in further lines."""
        table = self._table([name for name in names if name != "WHY"])
        unbounded = console.options.update(max_width=10_000)
        return table.__rich_measure__(console, unbounded).maximum + (_LEAST_WHY_WIDTH if "WHY" in names else 0)


def _worker_cells(worker: WorkerStatus) -> dict[str, str | Text]:
    state = state_of(worker)
    usage = worker.kv_usage
    return {
        "WORKER": worker.worker_id,
        "ROLE": worker.role,
        "STATE": Text(state, _STYLES[state]),
        "SHARD": worker.shard or "-",
        "#EPOCH": str(worker.epoch),
        "#LEASE": "-" if worker.lease_remaining_s is None else f"{worker.lease_remaining_s:.1f} s",
        "#WAIT": str(worker.load.num_waiting),
        "#RUN": str(worker.load.num_running),
        "#KV": "-" if usage is None else f"{usage:.0%}",
        "#WORK": work_of(worker),
        "#WEIGHTS": weights_of(worker),
        "ADDRESS": worker.rpc_address,
        "WHY": Text(worker.message),
    }


def _compositions(compositions: tuple[CompositionStatus, ...]) -> Table:
    table = _table("COMPOSITION", "STATE", "EXPERTS", "#FALLBACKS", "WHY")
    for composition in compositions:
        experts = ", ".join(
            expert.name + (" (general)" if expert.general else "") + ("" if expert.healthy else " (down)")
            for expert in composition.experts
        )
        state = Text(composition.state, _COMPOSITION_STYLES.get(composition.state, ""))
        why = "; ".join(filter(None, (composition.message, composition.last_fallback)))
        table.add_row(composition.name, state, experts, str(composition.num_fallbacks), Text(why))
    table.columns[2].no_wrap = False
    table.columns[2].overflow = "fold"
    table.columns[-1].overflow = "fold"
    if not any(composition.message or composition.last_fallback for composition in compositions):
        table.columns.pop()
    return table


def state_of(worker: WorkerStatus) -> str:
    """ready, draining, starting, or no session: ready by its own account, but the gateway has no connection to it."""
    if worker.draining:
        return "draining"
    if not worker.ready:
        return "starting"
    return "no session" if worker.connected is False else "ready"


def weights_of(worker: WorkerStatus) -> str:
    """What it holds; of an expert that shares memory and is not resident, how far it is."""
    load = worker.load
    if load.gauges.get("resident", 1.0) == 0.0:
        return f"{load.gauges.get('load_s', 0.0):.1f} s away"
    return size(load.resident_weight_bytes)


def work_of(worker: WorkerStatus) -> str:
    """What it has done since its start: tokens read and written, or rows computed."""
    load = worker.load
    if worker.role == "ffn":
        return f"{load.num_ffn_rows:,} rows"
    return f"{load.num_prompt_tokens:,} in, {load.num_generation_tokens:,} out"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 7 min, 4 d 3 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(num_bytes: int) -> str:
    """A number of bytes in the binary unit that fits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _table(*names: str) -> Table:
    """Names that begin with # are columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name.removeprefix("#"), justify="right" if name.startswith("#") else "left", no_wrap=name != "WHY")
    return table
