"""``antiphon serve``: a document's pools on this machine, until Ctrl-C (control speed).

Must not know: how anything is started or stopped.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.markup import escape

from antiphon.core.errors import AntiphonError, InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from antiphon.apps.journal import JournalEntry
    from antiphon.apps.serve_session import Ready, ServeSession
    from antiphon.client import Client
    from antiphon.core.spec import LLMDeployment

app = typer.Typer(add_completion=False)


_PLAIN_WIDTH = 160  # where the output is no terminal
_VIEW_DEADLINE_S = 2.5


class LogLevel(StrEnum):
    """Levels of process logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
def serve(
    file: Annotated[Path, typer.Option("--file", "-f", help="YAML file with an LLMDeployment.")],
    ask: Annotated[str | None, typer.Option(help="Ask this once everything is ready, print the answer, and stop.")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port instead of the document's; 0 = any.", min=0, max=65_535)] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port instead of the document's; 0 = any.", min=0, max=65_535)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until everything must be ready.", min=1)] = 300.0,
    drain: Annotated[float, typer.Option(help="Seconds that requests in flight get at the end.", min=0)] = 5.0,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the logs of all processes here.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Level of those logs.")] = LogLevel.INFO,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Start the same processes without Ray.", hidden=True)] = False,
) -> None:
    """Serve a document's pools on this machine until Ctrl-C."""
    document = _on_ports(_read(file), http_port, grpc_port)  # before anything slow is imported: a typing error is told at once
    from antiphon.apps.serve_plan import ServeSettings
    from antiphon.apps.serve_session import ServeSession
    from antiphon.apps.worker_config import LogSettings

    settings = ServeSettings(start_timeout_s=timeout, drain_s=drain, max_start_attempts=1, log=LogSettings(level=log_level.upper()))
    with ServeSession(document, settings, with_ray=not no_ray, log_dir=log_dir) as session:
        status = _run(session, document, ask)
    raise SystemExit(status)


def _read(file: Path) -> LLMDeployment:
    from antiphon.core.documents import read_documents
    from antiphon.core.spec import LLMDeployment

    documents = read_documents(file)
    found = [document for document in documents if isinstance(document, LLMDeployment)]
    if len(documents) != 1 or not found:
        kinds = ", ".join(f"{document.kind}/{document.metadata.name}" for document in documents)
        raise InvalidInput(f"{file}: serve takes one LLMDeployment, the file has {kinds}", "kind")
    empty = [pool.name for pool in found[0].spec.pools if pool.replicas == 0]
    if empty:
        raise InvalidInput(f"{file}: nothing can be served while pool {empty[0]} has 0 replicas", "spec.pools")
    return found[0]


def _on_ports(document: LLMDeployment, http_port: int | None, grpc_port: int | None) -> LLMDeployment:
    given = {"http_port": http_port, "grpc_port": grpc_port}
    endpoint = document.spec.endpoint.model_copy(update={key: port for key, port in given.items() if port is not None})
    return document.model_copy(update={"spec": document.spec.model_copy(update={"endpoint": endpoint})})


def _run(session: ServeSession, document: LLMDeployment, ask: str | None) -> int:
    """Start, serve, say what happens; the exit status."""
    from rich.console import Console

    from antiphon.apps.stop_signals import StopRequested
    from antiphon.cli.serve_view import Progress

    terminal = session.streams.terminal
    console = Console(file=terminal, highlight=False, soft_wrap=True, width=None if terminal.isatty() else _PLAIN_WIDTH)
    spec = document.spec
    console.print(f"[bold]{document.metadata.name}[/] serves {spec.model.uri}, topology {spec.topology.value}")
    progress = Progress(console)
    try:
        ready = session.start(lambda entries: progress.update(entries, session.num_workers), progress.say)
        progress.close()
        _print_ready(console, document, ready)
        if ask is not None:
            _ask(console, document, ready, ask)
        else:
            console.print("Ctrl-C stops it.", style="dim")
            _watch(console, session)
    except StopRequested:
        progress.close()
        console.print("Interrupted while starting.")
        return 130
    except AntiphonError as error:
        progress.close()
        console.print(f"[red]error:[/] {escape(str(error))}")
        return 1
    finally:
        progress.close()
        console.print("Stopping (a second Ctrl-C does not wait) ...", style="dim")
    return 0


def _print_ready(console: Console, document: LLMDeployment, ready: Ready) -> None:
    from antiphon.cli.serve_view import endpoints, times_line, worker_table

    console.print(worker_table(document, ready.workers))
    console.print(times_line(ready.entries, time.time() - psutil.Process().create_time()))
    console.print()
    console.print(endpoints(document, ready.ports))
    console.print()


def _watch(console: Console, session: ServeSession) -> None:
    from antiphon.cli.serve_view import later_line

    num_seen = len(session.entries())

    def show(entries: Sequence[JournalEntry]) -> None:
        nonlocal num_seen
        for entry in entries[num_seen:]:
            line = later_line(entry)
            if line is not None:
                console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False)
        num_seen = len(entries)

    session.watch(show)


def _ask(console: Console, document: LLMDeployment, ready: Ready, question: str) -> None:
    from antiphon.client import Client

    ports = ready.ports
    console.print(f"[bold]>[/] {escape(question)}")
    with Client(f"{ports.host}:{ports.grpc_port}", api_key=_api_key(document)) as client:
        _await_view(client, document)
        messages = [{"role": "user", "content": question}]
        with client.stream(document.model_name, messages=messages, max_tokens=64, temperature=0.0) as stream:
            for chunk in stream:
                console.print(chunk.text, end="", markup=False)
            console.print()
            usage = stream.usage
    pools = {pool.role: pool.name for pool in document.spec.pools}
    if usage is None:
        return
    remote = usage.num_remote_tokens
    generated = usage.num_completion_tokens
    parts = [f"{usage.num_prompt_tokens} prompt tokens"]
    if remote:
        parts.append(f"{remote} of them prefilled by pool {pools['prefill']}")
    by = " + ".join(pools[role] for role in ("monolith", "decode", "attention", "ffn") if role in pools)
    parts.append(f"{generated} tokens generated by {'pools' if '+' in by else 'pool'} {by}")
    decode_s = usage.finished_s - usage.first_token_s
    rate = f", then {(generated - 1) / decode_s:.1f} tokens/s" if generated > 1 and decode_s > 0 else ""
    console.print("; ".join(parts), style="dim")
    console.print(f"first token after {usage.first_token_s:.2f} s{rate}", style="dim")


def _await_view(client: Client, document: LLMDeployment) -> None:
    """Give the gateway and the workers a moment to have seen each other, so that the question takes the whole path."""
    num_by_role = Counter({pool.role: pool.replicas for pool in document.spec.pools})
    num_workers, num_peers = num_by_role.total(), num_by_role["prefill"] + num_by_role["ffn"]
    deadline = time.monotonic() + _VIEW_DEADLINE_S
    while time.monotonic() < deadline:
        workers = client.status().workers
        generating = [worker for worker in workers if worker.role in ("monolith", "decode", "attention")]
        if sum(worker.ready for worker in workers) >= num_workers and all(w.load.num_peers >= num_peers for w in generating):
            return
        time.sleep(0.1)


def _api_key(document: LLMDeployment) -> str | None:
    variable = document.spec.endpoint.api_keys_env
    return None if variable is None else os.environ.get(variable, "").partition(",")[0].strip() or None
