"""``antiphon coe`` verbs that make and judge a router: train, evaluate, add-expert, calibrate, replay (control speed).

Must not know: how any of it is done.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from antiphon.cli.coe.options import ArtifactDir, PolicyName, print_table, say, to_json_text


class Embedder(StrEnum):
    """Where the fast path's token vectors come from."""

    AUTO = "auto"
    MINILM = "minilm"
    LSA = "lsa"


Table = Annotated[Path, typer.Option("--table", help="Score table, .jsonl or .jsonl.gz.")]


def train(
    table: Table,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the artifact; an older artifact is replaced.")],
    seed: Annotated[int, typer.Option(help="Same table and seed: same bytes.")] = 0,
    embedder: Annotated[Embedder, typer.Option(help="Token vectors: minilm, lsa (from the prompts), or auto.")] = Embedder.AUTO,
    slow_path: Annotated[
        bool, typer.Option(help="Train a slow path with the sentence encoder, for unsure prompts: dearer, and no better so far.")
    ] = False,
    judge: Annotated[bool, typer.Option(help="Cross-validate too and write every figure into the model card.")] = False,
    max_experts: Annotated[int | None, typer.Option(min=1, help="Keep at most so many experts.")] = None,
    max_avg_params_b: Annotated[
        float | None, typer.Option(help="Average active parameters of the mapping, in 1e9, at most.")
    ] = None,
) -> None:
    """Train a router from a score table."""
    from antiphon.coe.judging.model_card import model_card
    from antiphon.coe.judging.plots import plots
    from antiphon.coe.judging.report import judge_table
    from antiphon.coe.routing.artifact import write_artifact
    from antiphon.coe.training.data.table import read_table
    from antiphon.coe.training.fit import Recipe
    from antiphon.coe.training.mapping import Budget
    from antiphon.coe.training.train import Options
    from antiphon.coe.training.train import train as train_router

    options = Options(
        recipe=Recipe(seed=seed),
        embedder=embedder.value,
        slow_path=slow_path,
        budget=Budget(max_avg_cost=max_avg_params_b, max_experts=max_experts),
    )
    artifact, prepared = train_router(read_table(table), options, say)
    report, extra = None, {}
    if judge:
        report, judged = judge_table(prepared, options.recipe, say)
        extra = plots(report, judged, artifact.categories)
        extra["figures.json"] = to_json_text(report.to_json()).encode()
    extra["model_card.md"] = model_card(artifact, report).encode()
    digest = write_artifact(artifact, out, extra)
    click.echo(f"{out}: {digest}")


def evaluate(
    table: Annotated[list[Path], typer.Option("--table", help="Score table, .jsonl or .jsonl.gz; may be given several times.")],
    artifact: Annotated[
        Path | None, typer.Option("--artifact", help="Directory of the router artifact; without it the recipe alone is judged.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    policy: Annotated[PolicyName, typer.Option(help="Policy of the artifact on unseen rows.")] = PolicyName.QUALITY,
    at_least: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Instead of a policy: the least cost that keeps this share of the best quality."),
    ] = None,
    learnt: Annotated[
        Path | None, typer.Option(help="The table that the artifact was trained on: simple routers learn from it and are compared.")
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="JSON file of promises; exit 1 when one is broken.")] = None,
    plot_dir: Annotated[Path | None, typer.Option("--plots", help="Write plots into this directory.")] = None,
    cross_validation: Annotated[
        bool | None, typer.Option(help="Judge the recipe too; default: when the artifact knows most of the table.")
    ] = None,
) -> None:
    """Judge a router: the artifact on rows it has not seen, and its recipe by cross-validation on each table."""
    from antiphon.coe.judging.held_out import judge_artifact, rows_of, unseen_rows
    from antiphon.coe.judging.plots import plots
    from antiphon.coe.judging.report import broken_promises, judge_table
    from antiphon.coe.judging.tables import dataset_rows, policy_tables, rows_for_people
    from antiphon.coe.routing.artifact import load_artifact
    from antiphon.coe.training.data.table import drop_duplicates, read_table
    from antiphon.coe.training.fit import Recipe
    from antiphon.coe.training.train import Options, prepare, recipe_of
    from antiphon.core.errors import InvalidInput

    if artifact is None and (learnt is not None or at_least is not None or cross_validation is False):
        raise InvalidInput("without an artifact there is nothing but the recipe to judge", "artifact")
    loaded = None if artifact is None else load_artifact(artifact)
    known = None if learnt is None else drop_duplicates(read_table(learnt))[0]
    recipe = Recipe() if loaded is None else recipe_of(loaded)
    results: dict[str, dict[str, Any]] = {}
    for path in table:
        rows, _ = drop_duplicates(read_table(path))
        result: dict[str, Any] = {"digest": None if loaded is None else loaded.digest, "cross_validation": None, "artifact": None}
        results[str(path)] = result
        validated = cross_validation
        if validated is None:
            validated = loaded is None or len(unseen_rows(loaded, rows)) <= len(rows) / 2
        if len(table) > 1 and not as_json:
            click.echo(f"{path}:")
        if validated:
            if not len(rows.complete):
                raise InvalidInput(f"no row of {path} has every expert's score; nothing can be judged", "table")
            options = Options(recipe=recipe)
            if loaded is not None:
                options = Options(recipe=recipe, embedder=loaded.training["embedder"], slow_path=loaded.slow is not None)
            prepared = prepare(rows.rows(rows.complete), options, say)
            report, judged = judge_table(prepared, recipe, say)
            result["cross_validation"] = report.to_json()
            if plot_dir is not None:
                plot_dir.mkdir(parents=True, exist_ok=True)
                for name, data in plots(report, judged, prepared.labels.categories).items():
                    (plot_dir / (name if len(table) == 1 else f"{path.name.split('.')[0]}-{name}")).write_bytes(data)
            if not as_json:
                print_table("recipe, cross-validated", rows_for_people(report))
                for title, lines in policy_tables(report):
                    print_table(title, lines, head=True)
                print_table("datasets", dataset_rows(report), head=True)
        held_out = None if loaded is None else judge_artifact(loaded, rows, policy.policy, recipe.seed, known, at_least)
        if held_out is not None:
            result["artifact"] = asdict(held_out)
            if not as_json:
                asked = f"policy {policy.value}" if at_least is None else f"at least {100 * at_least:g} % of the best quality"
                print_table(f"artifact, rows it has not seen, {asked}", rows_of(held_out))
        elif loaded is not None:
            say(f"{path}: no row with every score is new to the artifact; it is not judged by this table")
    result = next(iter(results.values())) if len(table) == 1 else {"tables": results}
    if as_json:
        click.echo(to_json_text(result))
    broken = [] if gate is None else broken_promises(result, gate)
    for promise in broken:
        click.echo(f"broken: {promise}", err=True)
    if broken:
        raise typer.Exit(1)


def add_expert(
    artifact: ArtifactDir,
    probes: Annotated[Path, typer.Option(help="Score table of the new expert alone: 20 to 50 prompts per category.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the new artifact.")],
) -> None:
    """Let a new expert join from a few scored probes, without training again."""
    from antiphon.coe.judging.model_card import model_card
    from antiphon.coe.routing.artifact import load_artifact, write_artifact
    from antiphon.coe.training.data.table import read_table
    from antiphon.coe.training.join import join_expert

    joined = join_expert(load_artifact(artifact), read_table(probes))
    digest = write_artifact(joined.artifact, out, {"model_card.md": model_card(joined.artifact, None).encode()})
    points = f"{100 * joined.gain:+.2f} points [{100 * joined.low:+.2f}, {100 * joined.high:+.2f}]"
    say(f"asked for {100 * joined.share:.0f} % of the probes; worth {points} over what is expected of the others there")
    if joined.low <= 0.0:
        say("the interval includes no gain at all: score more probes to be sure")
    click.echo(f"{out}: {digest}")


def calibrate(
    answers: Annotated[
        Path, typer.Option(help='Scored answers, JSON lines {"expert", "mean_logprob", "score"}: log-probability per token, 0..1.')
    ],
    accept: Annotated[float, typer.Option(min=0.01, max=0.99, help="Chance of a good answer from which one is taken.")] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the checks of a cascade from answers that were scored; what they are worth is measured on answers kept from them."""
    from antiphon.coe.judging.checks import checks_from

    found = checks_from(answers, accept)
    if as_json:
        click.echo(to_json_text({"checks": [asdict(check) for check in found]}))
        return
    click.echo("checks:  # of spec.combine")
    for check in found:
        click.echo(f"- {{expert: {check.expert}, weight: {check.weight}, bias: {check.bias}}}")
        score = "" if check.accepted_score is None else f", which score {check.accepted_score:.3f}"
        say(
            f"{check.expert}: {check.num_answers} answers score {check.mean_score:.3f}; at {accept:g} it accepts "
            f"{100 * check.accepted:.0f} %{score}; calibration error {check.calibration_error:.3f}"
        )


def replay(
    file: Annotated[Path, typer.Option("-f", "--file", help="YAML file with a CompositionOfExperts that learns.")],
    log: Annotated[list[Path], typer.Option(help="Log of feedbacks (spec.learning.log); may be given several times, in order.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what learning from a log of feedbacks would have changed, and whether it would have been for the better."""
    from antiphon.coe.routing.learning.log import read_feedback
    from antiphon.coe.routing.learning.online import replayed
    from antiphon.core.document.composition import CompositionOfExperts, LearningSpec
    from antiphon.core.document.loading import read_documents
    from antiphon.core.errors import InvalidInput

    documents = [d for d in read_documents(file) if isinstance(d, CompositionOfExperts)]
    if len(documents) != 1:
        raise InvalidInput(f"{file} has {len(documents)} CompositionOfExperts; one is replayed", "file")
    found = replayed(documents[0].spec.learning or LearningSpec(), [one for path in log for one in read_feedback(path)])
    shifts = [{"category": c, "expert": e, "shift": round(shift, 6)} for (c, e), shift in found.shifts.items()]
    if as_json:
        click.echo(to_json_text({**asdict(found), "shifts": shifts}))
        return
    print_table(
        None,
        [
            ("feedbacks", str(found.num_feedbacks)),
            ("mean squared error, artifact alone", f"{found.error_before:.5f}"),
            ("mean squared error, learning", f"{found.error_after:.5f}"),
            ("drift alarms", str(found.num_alarms)),
            *((f"{one['category']}, {one['expert']}", f"{one['shift']:+.4f}") for one in shifts),
        ],
    )


def example(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, .jsonl or .jsonl.gz.")],
    seed: Annotated[int, typer.Option(help="Another seed, other rows.")] = 0,
) -> None:
    """Write a made-up score table to try the other commands with."""
    from antiphon.coe.training.data.example_table import example_table
    from antiphon.coe.training.data.table import write_table

    write_table(example_table(seed=seed), out)
    click.echo(str(out))
