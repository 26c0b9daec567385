"""``antiphon coe`` verbs that use a router: route, serve, demo (control speed).

Must not know: how any of it is done.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import click
import typer

from antiphon.cli.coe.options import PLAIN_WIDTH, ArtifactDir, PolicyName, print_table, say, to_json_text


def route(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    artifact: ArtifactDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    policy: Annotated[PolicyName, typer.Option(help="What to weigh against quality.")] = PolicyName.QUALITY,
) -> None:
    """Show which expert would serve a prompt, and why."""
    from antiphon.coe.routing.artifact import load_artifact
    from antiphon.coe.routing.decision import Question
    from antiphon.coe.routing.record_json import record_json
    from antiphon.coe.routing.router import Router, spec_of

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    loaded = load_artifact(artifact)
    record = Router(spec_of(loaded), loaded).route(Question(prompt=prompt, policy=policy.policy))
    value = record_json(record)
    if as_json:
        click.echo(to_json_text(value))
    else:
        names = ("expert", "category", "confidence", "familiarity", "reason", "detail", "runner_up")
        print_table(None, [(name, str(value[name])) for name in names])


def serve(
    file: Annotated[Path, typer.Option("-f", "--file", help="YAML file with CompositionOfExperts documents.")],
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="Where a deploymentRef is reached: <deployment>=<base URL>,<model>; once per deployment."),
    ] = None,
    directory: Annotated[
        str | None, typer.Option(help="Directory of workers and routers: redis:// or grpc://; gateways find the router there.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Whose workers in that directory answer for a deploymentRef: <deployment>=<model>; once per deployment."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP; 0 = any free port.")] = 8100,
    grpc_port: Annotated[int, typer.Option(help="gRPC; 0 = any free port.")] = 9100,
    api_keys_env: Annotated[str | None, typer.Option(help="Environment variable with the accepted API keys.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="File of hashed API keys (antiphon keys).")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of the doors' certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
) -> None:
    """Serve the router: with doors of its own over experts elsewhere, or for gateways that find it in a directory."""
    import asyncio
    import os
    import signal

    from antiphon.coe.serving.app import CoeConfig, run_coe
    from antiphon.core.document.coe.experts import ExternalEndpoint
    from antiphon.core.document.composition import CompositionOfExperts
    from antiphon.core.document.loading import read_documents
    from antiphon.core.errors import InvalidInput, Unavailable
    from antiphon.gateway.access.keys import keys_from
    from antiphon.gateway.config import BoundPorts
    from antiphon.rpc.certificates import TlsFiles

    documents = tuple(d for d in read_documents(file) if isinstance(d, CompositionOfExperts))
    if not documents:
        raise InvalidInput(f"{file} has no CompositionOfExperts", "kind")
    endpoints = {}
    for text in endpoint or []:
        name, _, where = text.partition("=")
        url, _, asked = where.rpartition(",")
        if not name or not url.startswith(("http://", "https://")) or not asked:
            raise InvalidInput(f"{text!r} is not <deployment>=<base URL>,<model>", "endpoint")
        endpoints[name] = ExternalEndpoint(url=url, model=asked)
    models = {}
    for text in model or []:
        name, _, served = text.partition("=")
        if not name or not served:
            raise InvalidInput(f"{text!r} is not <deployment>=<model>", "model")
        models[name] = served
    keys = frozenset() if api_keys_env is None else keys_from(os.environ.get(api_keys_env))
    if api_keys_env is not None and not keys:
        raise Unavailable(f"no API keys in the environment variable {api_keys_env}")
    if (tls_certificate is None) != (tls_key is None):
        raise InvalidInput("give --tls-certificate and --tls-key, or neither", "tls-key")
    config = CoeConfig(
        documents=documents,
        endpoints=endpoints,
        models=models,
        directory=directory,
        registers=directory is not None,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        api_keys=keys,
        api_keys_file=api_keys_file,
        tls=None if tls_certificate is None or tls_key is None else TlsFiles(certificate=tls_certificate, key=tls_key),
    )

    def opened(ports: BoundPorts) -> None:
        click.echo(f"HTTP http{'s' if tls_key else ''}://{ports.host}:{ports.http_port}/v1  gRPC {ports.host}:{ports.grpc_port}")

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await run_coe(config, stop, on_bound=opened)

    asyncio.run(run())


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this instead of the demo's own; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put SmolLM2 and two very small models trained here behind one name, and show who answers what, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    from antiphon.apps.demo.composition import SHOWN, run

    result = run(say, prompts=prompt or SHOWN)
    if as_json:
        click.echo(to_json_text({"answers": [asdict(answer) for answer in result.answers], "mean_scores": result.mean_scores}))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    if result.mean_scores:
        experts = list(next(iter(result.mean_scores.values())))
        console.print("Right answers in the table that the router was trained on:")
        measured = RichTable("category", *experts, box=None, header_style="bold")
        for category, scores in result.mean_scores.items():
            measured.add_row(category, *(f"{scores[expert]:.0%}" for expert in experts))
        console.print(measured)
        console.print()
    shown = RichTable("prompt", "answered by", "category", "sure", "why", "answer", box=None, header_style="bold")
    for answer in result.answers:
        sure = f"{float(answer.confidence):.2f}"
        shown.add_row(*map(escape, (answer.prompt, answer.expert, answer.category, sure, answer.why, answer.answer)))
    console.print(shown)
    console.print(f"The router is kept in {escape(str(result.router))}; its model card says what it is made of.", style="dim")
