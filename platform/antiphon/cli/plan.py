"""``antiphon plan``: cost, deploy, simulate, calibrate, hardware, models (control speed).

Parses, asks the planner, prints. Must not know: any formula.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antiphon.core.documents import read_documents
from antiphon.core.errors import InvalidInput
from antiphon.core.spec import LLMDeployment

if TYPE_CHECKING:
    from antiphon.planner.hardware import Catalogue
    from antiphon.planner.summary import Table

app = typer.Typer(no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Explain = Annotated[bool, typer.Option("--explain", help="Show each number's formula with its values.")]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware-file", help="JSON or YAML with further accelerators, or other prices.")
]
Document = Annotated[Path | None, typer.Option("--file", "-f", help="LLMDeployment document.")]
Model = Annotated[str | None, typer.Option("--model", help="Name in the library, or path to a config.json.")]
Fleet = Annotated[
    list[str] | None, typer.Option("--hardware", help="Accelerator to choose from; repeatable. 'local' measures this machine.")
]
Role = Annotated[
    list[str] | None,
    typer.Option("--role", help="ROLE=ACCELERATOR; roles: colocated, prefill, decode, attention, ffn. Repeatable."),
]
Tpot = Annotated[float | None, typer.Option("--tpot-ms", min=0.001, help="Time per output token to keep.")]
Ttft = Annotated[float | None, typer.Option("--ttft-ms", min=0.001, help="Time to first token to keep, 95th percentile.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Most accelerators to use.")]
Rate = Annotated[float | None, typer.Option("--rate", min=1e-9, help="Requests per second to serve.")]
Context = Annotated[float | None, typer.Option("--context", min=1, help="Mean decode context in tokens.")]
Prompt = Annotated[int | None, typer.Option("--prompt-tokens", min=1, help="Length of every prompt.")]
Output = Annotated[int | None, typer.Option("--output-tokens", min=1, help="Length of every answer.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="CSV or JSON lines: prompt_tokens, output_tokens, arrival_s.")]
Weights = Annotated[str | None, typer.Option("--weights", help="Format of the weights.")]
Kv = Annotated[str | None, typer.Option("--kv", help="Format of the KV cache.")]
Compute = Annotated[str | None, typer.Option("--compute", help="Format to compute in.")]
Skew = Annotated[float | None, typer.Option("--expert-skew", min=1, help="Load of the hottest FFN card over the mean.")]
Price = Annotated[float | None, typer.Option("--price", min=1e-9, help="USD per hour of the local machine.")]


@app.command()
def cost(
    model: Annotated[str, typer.Option("--model", help="Name in the library, or path to a config.json.")],
    context: Annotated[float, typer.Option("--context", min=1, help="Decode context in tokens.")] = 8192,
    hardware: Fleet = None,
    hardware_file: HardwareFile = None,
    weights: Weights = None,
    kv: Kv = None,
    compute: Compute = None,
    price: Price = None,
    explain: Explain = False,
    as_json: AsJson = False,
) -> None:
    """What a decoded token costs a model, and a million of them on each accelerator with a price."""
    from antiphon.planner.as_json import cost_json, derivation_json
    from antiphon.planner.formula import Derivation
    from antiphon.planner.local_machine import measure_local
    from antiphon.planner.question import LOCAL, chosen_formats, resolve_model
    from antiphon.planner.summary import cost_tables, derivation_lines
    from antiphon.planner.token_cost import token_cost

    found, catalogue = resolve_model(model), _catalogue(hardware_file)
    if hardware and LOCAL in hardware and LOCAL not in catalogue.accelerators:
        catalogue = catalogue.including(measure_local(price))
    cards = [catalogue.get(key) for key in hardware] if hardware else list(catalogue.priced)
    derivation = Derivation() if explain else None
    formats = chosen_formats(found.formats, weights=weights, compute=compute, kv=kv)
    result = token_cost(found, cards, context, formats, derivation)
    if as_json:
        value: dict[str, Any] = cost_json(result)
        if derivation is not None:
            value["explanation"] = derivation_json(derivation)
        print(json.dumps(value, indent=2))
        return
    _show(cost_tables(result))
    if derivation is not None:
        print("\n".join(derivation_lines(derivation)))


@app.command()
def deploy(
    file: Document = None,
    model: Model = None,
    hardware: Fleet = None,
    role: Role = None,
    hardware_file: HardwareFile = None,
    tpot_ms: Tpot = None,
    ttft_ms: Ttft = None,
    gpus: Gpus = None,
    rate: Rate = None,
    context: Context = None,
    prompt_tokens: Prompt = None,
    output_tokens: Output = None,
    trace: Trace = None,
    weights: Weights = None,
    kv: Kv = None,
    compute: Compute = None,
    expert_skew: Skew = None,
    price: Price = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with pictures to this file.")] = None,
    explain: Explain = False,
    as_json: AsJson = False,
) -> None:
    """What to run on which hardware, how many of each, and whether AFD pays. Exits with 1 when nothing is feasible."""
    from antiphon.planner import html_report, summary
    from antiphon.planner.as_json import derivation_json, plan_json
    from antiphon.planner.plan import explain as derive
    from antiphon.planner.plan import make_plan
    from antiphon.planner.question import Wishes, question

    wishes = Wishes(
        model=model, fleet=tuple(hardware or ()), roles=_roles(role), tpot_ms=tpot_ms, ttft_ms=ttft_ms,
        gpu_budget=gpus, rate=rate, context=context, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        trace=trace, weights=weights, kv=kv, compute=compute, expert_skew=expert_skew, price=price,
    )  # fmt: skip
    asked = question(wishes, _catalogue(hardware_file), _document(file), _folder(file))
    plan = make_plan(asked.planner)
    if html is not None:
        html.write_text(html_report.report(plan, asked.model, asked.fleet, derive(plan)))
    if as_json:
        value = plan_json(plan)
        if explain:
            value["explanation"] = derivation_json(derive(plan))
        print(json.dumps(value, indent=2))
    else:
        if plan.options:
            _show([summary.roles_table(plan), summary.option_table(plan)])
        print(f"{plan.verdict}: {plan.reason}")
        if plan.fabric is not None:
            feeds = "feeds" if plan.fabric.feeds else "is too slow to fill"
            print(
                f"fabric: sparsity {plan.fabric.sparsity:.3f} of the model, {plan.fabric.min_sparsity:.3f} the least that "
                f"fills its FFN cards in three stages; it {feeds} them"
            )
        if explain:
            print("\n".join(summary.derivation_lines(derive(plan))))
    if plan.chosen is None:
        raise typer.Exit(1)


@app.command()
def simulate(
    file: Document = None,
    model: Model = None,
    hardware: Fleet = None,
    role: Role = None,
    hardware_file: HardwareFile = None,
    tpot_ms: Tpot = None,
    ttft_ms: Ttft = None,
    gpus: Gpus = None,
    rate: Rate = None,
    context: Context = None,
    prompt_tokens: Prompt = None,
    output_tokens: Output = None,
    trace: Trace = None,
    wiring: Annotated[str | None, typer.Option("--wiring", help="colocated, pd or afd; none = the verdict's.")] = None,
    duration_s: Annotated[float, typer.Option("--duration-s", min=1, help="Simulated seconds.")] = 600,
    warm_up_s: Annotated[float, typer.Option("--warm-up-s", min=0, help="Seconds not counted.")] = 60,
    trace_arrivals: Annotated[bool, typer.Option("--trace-arrivals", help="Arrivals of the trace, not Poisson.")] = False,
    failures: Annotated[float, typer.Option("--failures", min=0, help="Failures per card and hour.")] = 0,
    repair_s: Annotated[float, typer.Option("--repair-s", min=0, help="Seconds until a worker is back.")] = 120,
    failover_s: Annotated[float, typer.Option("--failover-s", min=0, help="Seconds until an FFN shard is replaced.")] = 1,
    stragglers: Annotated[float, typer.Option("--stragglers", min=0, help="Slowdowns per card and hour.")] = 0,
    straggle_factor: Annotated[float, typer.Option("--straggle-factor", min=1, help="How slow.")] = 1.5,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and failures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan, then run the planned pools under arrivals, failures and stragglers."""
    from antiphon.planner.as_json import plan_json, simulation_json
    from antiphon.planner.options import Wiring
    from antiphon.planner.plan import make_plan
    from antiphon.planner.question import Wishes, question
    from antiphon.planner.simulation import SimulationInput, default_rate, simulate_option
    from antiphon.planner.summary import roles_table, simulation_table

    wishes = Wishes(
        model=model, fleet=tuple(hardware or ()), roles=_roles(role), tpot_ms=tpot_ms, ttft_ms=ttft_ms,
        gpu_budget=gpus, rate=rate, context=context, prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=trace,
    )  # fmt: skip
    planner = question(wishes, _catalogue(hardware_file), _document(file), _folder(file)).planner
    plan = make_plan(planner)
    if wiring is not None and wiring not in {w.value for w in Wiring}:
        raise InvalidInput(f"no wiring {wiring!r}; they are {', '.join(w.value for w in Wiring)}", "wiring")
    option = plan.chosen if wiring is None else plan.options.get(Wiring(wiring))
    if option is None:
        raise InvalidInput(f"nothing to simulate: {plan.reason}", "wiring")
    inputs = SimulationInput(
        rate=None if trace_arrivals else default_rate(planner, option), duration_s=duration_s, warm_up_s=warm_up_s,
        failures_per_card_hour=failures, repair_s=repair_s, ffn_failover_s=failover_s,
        stragglers_per_card_hour=stragglers, straggle_factor=straggle_factor, seed=seed,
    )  # fmt: skip
    result = simulate_option(planner, option, inputs)
    if as_json:
        print(json.dumps({"plan": plan_json(plan), "wiring": option.wiring.value, "rate": inputs.rate,
                          "simulation": simulation_json(result)}, indent=2))  # fmt: skip
        return
    _show([roles_table(plan), simulation_table(result)] if option is plan.chosen else [simulation_table(result)])


@app.command()
def calibrate(
    file: Annotated[Path, typer.Option("--input", "-i", help="JSON lines written by antiphon bench.")],
    hold_out: Annotated[str, typer.Option("--hold-out", help="Batch sizes to predict without having seen them.")] = "",
    as_json: AsJson = False,
) -> None:
    """Fit stage and step times to measurements, and hold predictions against them."""
    import dataclasses
    import math

    from antiphon.planner.calibration import calibrate as run
    from antiphon.planner.calibration import read_measurements
    from antiphon.planner.summary import comparison_table

    try:
        held_out = frozenset(int(batch) for batch in hold_out.split(",") if batch.strip())
    except ValueError:
        raise InvalidInput(f"--hold-out {hold_out!r} is no list of batch sizes such as 1,8,32,64", "hold_out") from None
    fitted, comparisons = run(read_measurements(file), held_out)
    if not as_json:
        _show([comparison_table(comparisons)])
        return
    print(
        json.dumps(
            {
                "fits": [{**dataclasses.asdict(one), "method": one.method} for one in fitted],
                "comparisons": [
                    {
                        **dataclasses.asdict(c.measurement),
                        "predicted_s": None if math.isnan(c.predicted_s) else c.predicted_s,
                        "error": None if math.isnan(c.predicted_s) else c.error,
                        "held_out": c.held_out,
                    }
                    for c in comparisons
                ],
            },
            indent=2,
        )
    )


@app.command()
def hardware(
    hardware_file: HardwareFile = None,
    local: Annotated[bool, typer.Option("--local", help="Measure this machine too, in a few seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """The accelerators that are known, with the source of each figure."""
    from antiphon.planner.as_json import accelerator_json
    from antiphon.planner.local_machine import measure_local
    from antiphon.planner.summary import hardware_table

    cards = list(_catalogue(hardware_file).accelerators.values())
    if local:
        cards.append(measure_local())
    if as_json:
        print(json.dumps({card.key: accelerator_json(card) for card in cards}, indent=2))
    else:
        _show([hardware_table(cards)])


@app.command()
def models(as_json: AsJson = False) -> None:
    """The models in the library."""
    from antiphon.planner.library import find_model, model_names
    from antiphon.planner.summary import models_table

    found = [find_model(name) for name in model_names()]
    if not as_json:
        _show([models_table(found)])
        return
    listing = {
        model.name: {
            "title": model.title,
            "source": model.source,
            "parameters": model.shape.total_weights,
            "activated_parameters": model.shape.activated_weights,
            "ffn_parameters": model.shape.ffn_weights,
            "attention_side_parameters": model.shape.attention_side_weights,
            "num_layers": model.shape.num_layers,
        }
        for model in found
    }
    print(json.dumps(listing, indent=2))


def _catalogue(file: Path | None) -> Catalogue:
    from antiphon.planner.hardware import Catalogue

    return Catalogue.built_in() if file is None else Catalogue.built_in().with_file(file)


def _document(file: Path | None) -> LLMDeployment | None:
    if file is None:
        return None
    deployments = [document for document in read_documents(file) if isinstance(document, LLMDeployment)]
    if len(deployments) != 1:
        raise InvalidInput(f"{file}: has {len(deployments)} LLMDeployment documents; a plan is made for one", "file")
    return deployments[0]


def _folder(file: Path | None) -> Path:
    return Path() if file is None else file.parent


def _roles(options: list[str] | None) -> dict[str, str]:
    roles = {}
    for option in options or ():
        role, separator, key = option.partition("=")
        if not separator or not role or not key:
            raise InvalidInput(f"--role {option!r} is not ROLE=ACCELERATOR", "role")
        roles[role] = key
    return roles


def _show(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
