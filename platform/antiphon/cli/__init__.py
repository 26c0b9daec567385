"""The antiphon command: parse, import only what the verb needs, run (control speed).

A verb lives in a module of this package that has ``app``, a typer application. VERBS is the only list of them;
``antiphon --help`` reads it without importing any. Every error is a line of ``cli.errors``; the exit status is 1 (2 = wrong usage).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import click
import typer
from click.shell_completion import CompletionItem

from antiphon.cli.errors import ABORTS, FAILED, USAGE_ERRORS, error_lines, tell, tell_usage
from antiphon.core.errors import AntiphonError, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A verb's module in this package and its line in the help."""

    module: str
    help: str


VERBS = {
    "serve": Verb(module="serving.serve", help="Serve a model, or the documents of a file, on this machine."),
    "init": Verb(module="init", help="Write a commented document for a model."),
    "examples": Verb(module="examples", help="List the example documents, or print one."),
    "chat": Verb(module="serving.chat", help="Chat in the terminal with a served model."),
    "validate": Verb(module="validate", help="Check documents and name every wrong field."),
    "status": Verb(module="serving.status", help="Show pools, workers, leases and load."),
    "convert": Verb(module="models.convert", help="Turn a GGUF file into a checkpoint directory."),
    "inspect": Verb(module="models.inspect", help="Show what a model is made of and what each pool would hold."),
    "experts": Verb(module="models.experts", help="Show the load of experts, move them, search which may be skipped."),
    "bench": Verb(module="bench", help="Measure transports, prefill, decode and mixed load."),
    "plan": Verb(module="plan", help="Plan pools: cost, attention:FFN ratio, verdict, simulation."),
    "coe": Verb(module="coe", help="Composition of experts: train, evaluate, route."),
    "keys": Verb(module="keys", help="Make API keys, and the hashed lines that a key file holds."),
    "k8s": Verb(module="k8s", help="A deployment on a cluster: its tree, why it is not ready, logs, a port to it."),
    "completion": Verb(module="completion", help="Let a shell complete verbs and options: bash, zsh, fish."),
    "doctor": Verb(module="doctor", help="Check this machine and cluster for what Antiphon needs."),
}


# Modules that only an extra brings, and which.
EXTRAS = {
    **dict.fromkeys(("sklearn", "scipy", "onnx", "onnxruntime", "threadpoolctl"), "coe"),
    "matplotlib": "plan",
    **dict.fromkeys(("aiohttp", "huggingface_hub", "jsonpatch", "kopf", "lightkube", "minio"), "operator"),
    "nixl": "nixl",
}
_ASK_A_GATEWAY = ("chat", "status", "experts", "keys")


def _complete(ctx: click.Context, _param: click.Parameter | None, incomplete: str) -> list[CompletionItem]:
    """Words of a verb, for a shell that completes them."""
    from antiphon.cli.completion import complete_words

    module = importlib.import_module(f"antiphon.cli.{VERBS[str(ctx.info_name)].module}")
    return complete_words(typer.main.get_command(module.app), ctx.params.get("arguments") or (), incomplete)


class _PassedOn(click.Command):
    """A verb, whose arguments pass through to its module."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return _complete(ctx, None, incomplete)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            near = difflib.get_close_matches(cmd_name, VERBS, n=1)
            ctx.fail(f"no such command {cmd_name!r}" + (f"; did you mean {near[0]}?" if near else "; antiphon --help lists them"))
        # typer brings a click of its own, whose exits and usage errors only its own ``main`` understands: arguments pass through.
        return _PassedOn(
            cmd_name,
            callback=functools.partial(_run, cmd_name, verb),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, shell_complete=_complete)],
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            add_help_option=False,
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


def _run(name: str, verb: Verb, arguments: tuple[str, ...]) -> None:
    try:
        _call(name, importlib.import_module(f"antiphon.cli.{verb.module}"), arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        tell(f"antiphon {name} needs {missing}: pip install 'antiphon[{EXTRAS[missing]}]'")
        sys.exit(FAILED)
    except Unavailable as error:
        if name not in _ASK_A_GATEWAY:
            raise
        from antiphon.cli.serving.connection import IS_IT_RUNNING

        tell(f"{error}; {IS_IT_RUNNING}")
        sys.exit(FAILED)


def _call(name: str, module: ModuleType, arguments: tuple[str, ...]) -> None:
    command = typer.main.get_command(module.app)
    status = command.main(
        args=list(arguments), prog_name=f"antiphon {name}", help_option_names=["-h", "--help"], standalone_mode=False
    )
    if status:  # what a verb left with, by typer.Exit
        sys.exit(int(status))


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from antiphon import __version__

        click.echo(f"antiphon {__version__}")
        ctx.exit()


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version.")
def _root() -> None:
    """Serve language models with attention and FFN on separate pools."""


def main() -> None:
    """Entry point of the ``antiphon`` script."""
    try:
        sys.exit(_root.main(prog_name="antiphon", standalone_mode=False))
    except USAGE_ERRORS as error:
        sys.exit(tell_usage(error))
    except ABORTS:  # the input ended where an answer was asked for
        tell("interrupted")
        sys.exit(130)
    except AntiphonError as error:
        tell(*error_lines(error))
        sys.exit(FAILED)
