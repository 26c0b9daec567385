"""``antiphon serve``: documents' pools and compositions on this machine, until Ctrl-C (control speed).

Must not know: how anything is started or stopped.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.markup import escape

from antiphon.cli.errors import FAILED, error_lines, tell
from antiphon.cli.serving.first_checks import check, check_checkpoints
from antiphon.cli.serving.quick_document import API_KEYS_ENV, Wishes, document_text, is_document
from antiphon.core.document.spec import Topology
from antiphon.core.errors import AntiphonError, InvalidInput, SpecInvalid

if TYPE_CHECKING:
    from rich.console import Console

    from antiphon.apps.serve.deployment_set import Serving
    from antiphon.apps.serve.session import Ready, ServeSession
    from antiphon.apps.supervision.event_log import EventLogEntry
    from antiphon.client import Client, Tls

app = typer.Typer(add_completion=False, rich_markup_mode=None)


_DRAIN_S = 60.0
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
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A .yaml document, hf://org/name, org/name, a checkpoint directory or a .gguf file."
        ),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="YAML file with LLMDeployments and CompositionOfExperts; may be given several times."),
    ] = None,
    topology: Annotated[Topology | None, typer.Option(help="How MODEL is split over pools; default monolith.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: MODEL's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for MODEL's workers.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: the document's, this machine only.")] = None,
    http_port: Annotated[
        int | None, typer.Option("--port", "--http-port", help="HTTP port instead of the document's; 0 = any.", min=0, max=65_535)
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port instead of the document's; 0 = any.", min=0, max=65_535)] = None,
    api_key: Annotated[
        str | None, typer.Option(help=f"Key that clients must send; several with commas. Better: the variable {API_KEYS_ENV}.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the document of MODEL and end.")] = False,
    ask: Annotated[str | None, typer.Option(help="Ask this once everything is ready, print the answer, and stop.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until everything must be ready.", min=1)] = 300.0,
    drain: Annotated[
        float | None,
        typer.Option(help="Seconds that requests in flight get at the end; default: the document's kubernetes.drainS.", min=0),
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the logs of all processes here.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Level of those logs.")] = LogLevel.INFO,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="Join this running Ray; default: RAY_ADDRESS, or a Ray of its own."),
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Start its Ray with the dashboard, on this machine only.")] = False,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Start the same processes without Ray.", hidden=True)] = False,
) -> None:
    """Serve a model, or documents' pools and compositions over them, on this machine until Ctrl-C."""
    # Before anything slow is imported: a mistake is told at once.
    wishes = {"--topology": topology, "--dtype": dtype, "--device": device}
    if model is not None and not is_document(model):
        if files:
            raise InvalidInput("give a model or --file, not both", "model")
        if api_key is not None:
            os.environ[API_KEYS_ENV] = api_key
        made = document_text(
            model,
            Wishes(
                topology=topology or Topology.MONOLITH,
                dtype=dtype,
                device=device,
                host=host,
                http_port=http_port,
                grpc_port=grpc_port,
                with_keys=api_key is not None or bool(os.environ.get(API_KEYS_ENV)),
            ),
        )
        if dry_run:
            print(made, end="")
            read_text(made, model)
            return
        print(made)
        serving, sources = read_text(made, model), []
    else:
        given = [*(files or []), *([Path(model)] if model is not None else [])]
        if not given:
            raise InvalidInput("what to serve? Give a model, a document, or --file", "model")
        if said := [name for name, value in wishes.items() if value is not None]:
            raise InvalidInput(f"{said[0]} is for a model; a document says it itself", said[0])
        serving = read_serving(given).with_ports(http_port, grpc_port)
        serving, sources = with_door(serving, host, api_key), given
        if dry_run:
            for path in given:
                print(path.read_text(encoding="utf-8"), end="")
            return
    from antiphon.apps.on_ray.joining import address_from

    joined = None if no_ray and ray_address is None else address_from(ray_address)
    for option, is_given, why in (
        ("--no-ray", no_ray, "starts without Ray"),
        ("--dashboard", dashboard, "is for a Ray that this command starts; a running one has its own, or none"),
    ):
        if is_given and joined is not None:
            raise InvalidInput(f"{option} {why}: leave out --ray-address (and RAY_ADDRESS)", option)
    if dashboard and no_ray:
        raise InvalidInput("--dashboard is Ray's: leave out --no-ray", "--dashboard")
    placing(check, serving, sources)
    from antiphon.apps.process.config import LogSettings
    from antiphon.apps.serve.plan import ServeSettings
    from antiphon.apps.serve.session import ServeSession

    drains = [document.spec.kubernetes.drain_s for document in serving.deployments]
    drain_s = max(drains, default=_DRAIN_S) if drain is None else drain
    settings = ServeSettings(
        start_timeout_s=timeout,
        drain_s=drain_s,
        max_start_attempts=1,
        log=LogSettings(level=log_level.upper()),
        ray_address=joined,
        ray_dashboard=dashboard,
    )
    with ServeSession(serving, settings, with_ray=not no_ray, log_dir=log_dir) as session:
        status = _run(session, serving, ask, sources)
    if session.must_leave_hard:
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)


def placing(look: Callable[[Serving], None], serving: Serving, sources: Sequence[Path]) -> None:
    """Look at what is served; what is wrong is told with the file and the line.

    Raises:
        SpecInvalid: what ``look`` found.
    """
    from antiphon.core.document.loading import placed

    try:
        look(serving)
    except SpecInvalid as error:
        raise SpecInvalid(placed(error.problems, sources)) from None


def read_text(text: str, source: str) -> Serving:
    """What a document made here asks for.

    Raises:
        SpecInvalid: an option has a value that documents don't take.
    """
    from antiphon.apps.serve.deployment_set import serving_of
    from antiphon.core.document.loading import parse_documents

    return serving_of(parse_documents(text, source), source)


def with_door(serving: Serving, host: str | None, api_key: str | None) -> Serving:
    """The same on another address, or with a key: ``api_key``, or those of the variable where the document names no keys."""
    changed: dict[str, str] = {}
    if host is not None:
        changed["host"] = host
    if api_key is not None:
        variable = serving.endpoint.api_keys_env or API_KEYS_ENV
        os.environ[variable] = api_key
        changed["api_keys_env"] = variable
    elif os.environ.get(API_KEYS_ENV) and serving.endpoint.api_keys_env is None and serving.endpoint.api_keys_file is None:
        changed["api_keys_env"] = API_KEYS_ENV  # whoever sets it means its keys to be asked for, by any document
    return replace(serving, endpoint=serving.endpoint.model_copy(update=changed)) if changed else serving


def read_serving(files: Sequence[Path]) -> Serving:
    """What the files ask for together.

    Raises:
        SpecInvalid: a document is wrong, or they don't fit together.
    """
    from antiphon.apps.serve.deployment_set import serving_of
    from antiphon.core.document.loading import Document, placed, read_documents

    documents: list[Document] = []
    for file in files:
        documents += read_documents(file)
    source = ", ".join(map(str, files))
    try:
        return serving_of(documents, source)
    except SpecInvalid as error:
        raise SpecInvalid(placed([replace(p, source="" if len(files) > 1 else source) for p in error.problems], files)) from None


def _run(session: ServeSession, serving: Serving, ask: str | None, sources: Sequence[Path]) -> int:
    """Start, serve, say what happens; the exit status."""
    from rich.console import Console

    from antiphon.apps.serve.stop_signals import StopRequested
    from antiphon.cli.serving.serve_view import Progress, composition_line

    terminal = session.streams.terminal
    console = Console(file=terminal, highlight=False, soft_wrap=True, width=None if terminal.isatty() else _PLAIN_WIDTH)
    for document in serving.deployments:
        spec = document.spec
        console.print(f"[bold]{document.metadata.name}[/] serves {spec.model.uri}, topology {spec.topology.value}")
    for composition in serving.compositions:
        console.print(composition_line(composition))
    progress = Progress(console)
    try:
        ready = session.start(
            lambda entries: progress.update(entries, serving.num_processes),
            progress.say,
            progress.amount,
            lambda found: placing(check_checkpoints, found, sources),
        )
        progress.close()
        _print_ready(console, session.serving, ready)
        if ask is not None:
            _ask(console, serving, ready, ask)
        else:
            console.print("Ctrl-C stops it.", style="dim")
            _watch(console, session)
    except StopRequested:
        progress.close()
        console.print("Interrupted while starting.")
        return 130
    except AntiphonError as error:
        progress.close()
        tell(*error_lines(error), file=session.streams.errors)
        return FAILED
    finally:
        progress.close()
        console.print("Stopping (a second Ctrl-C does not wait) ...", style="dim")
    return 0


def _print_ready(console: Console, serving: Serving, ready: Ready) -> None:
    from rich.text import Text

    from antiphon.cli.serving.serve_view import endpoints, expert_table, times_line, worker_table

    if serving.deployments:
        console.print(worker_table(serving.deployments, ready.workers))
    for composition in serving.compositions:
        console.print()
        console.print(expert_table(composition, serving.models))
    console.print(times_line(ready.entries, time.time() - psutil.Process().create_time()))
    console.print()
    console.print(endpoints(serving, ready.ports))
    for note in ready.ray_commands:
        console.print(Text.assemble(("Ray   ", "bold"), (note, "dim")))
    for note in ready.notes:
        console.print(f"note  {note}", style="dim", markup=False)
    console.print()


def _watch(console: Console, session: ServeSession) -> None:
    from antiphon.cli.serving.serve_view import ThroughputLines, later_line

    num_seen = len(session.entries())
    throughput = ThroughputLines(session.gateway_logs)

    def show(entries: Sequence[EventLogEntry]) -> None:
        nonlocal num_seen
        for entry in entries[num_seen:]:
            line = later_line(entry)
            if line is not None:
                console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False)
        num_seen = len(entries)
        for line in throughput.new():
            console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False, style="dim")

    session.watch(show)


def _ask(console: Console, serving: Serving, ready: Ready, question: str) -> None:
    from antiphon.cli.serving.serve_view import first_model
    from antiphon.client import Client

    ports = ready.ports
    console.print(f"[bold]>[/] {escape(question)}")
    with Client(f"{ports.host}:{ports.grpc_port}", api_key=_api_key(serving), tls=_tls(serving)) as client:
        _await_view(client, serving)
        messages = [{"role": "user", "content": question}]
        with client.stream(first_model(serving), messages=messages, max_tokens=64, temperature=0.0) as stream:
            for chunk in stream:
                console.print(chunk.text, end="", markup=False)
            console.print()
            usage = stream.usage
            routed = stream.routed
    if routed:
        told = ", ".join(f"{key.removeprefix('x-antiphon-')} {value}" for key, value in routed.items() if value)
        console.print(told, style="dim")
    if usage is None or serving.compositions or len(serving.deployments) != 1:
        return
    pools = {pool.role: pool.name for pool in serving.deployments[0].spec.pools}
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


def _await_view(client: Client, serving: Serving) -> None:
    """Give the gateway and the workers a moment to have seen each other, so that the question takes the whole path."""
    num_peers = {}
    for document in serving.deployments:
        num_by_role = Counter({pool.role: pool.replicas for pool in document.spec.pools})
        num_peers[document.metadata.name] = num_by_role["prefill"] + num_by_role["ffn"]
    deadline = time.monotonic() + _VIEW_DEADLINE_S
    while time.monotonic() < deadline:
        workers = client.status().workers
        generating = [worker for worker in workers if worker.role in ("monolith", "decode", "attention")]
        linked = all(w.load.num_peers >= num_peers[w.deployment] for w in generating)
        if sum(worker.ready for worker in workers) >= serving.num_workers and linked:
            return
        time.sleep(0.1)


def _tls(serving: Serving) -> Tls | None:
    """How this process trusts its own deployment's door."""
    if serving.endpoint.tls is None:
        return None
    from antiphon.client import Tls
    from antiphon.rpc.credentials import name_in

    certificate = Path(serving.endpoint.tls.certificate_file).read_bytes()
    return Tls(root_certificates=certificate, server_name=name_in(certificate))


def _api_key(serving: Serving) -> str | None:
    """What this process, whose deployment it is, comes in with."""
    if serving.endpoint.api_keys_env is None and serving.endpoint.api_keys_file is None:
        return None
    from antiphon.gateway.access.keys import own_key

    return own_key()
