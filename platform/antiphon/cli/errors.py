"""How errors look on the terminal: one line on stderr that begins with "error:" (control speed).

Fields of documents are named as file:line: path: message, in the form that editors and terminals turn into links.
Must not know: any verb.
"""

from __future__ import annotations

import difflib
from typing import IO

import click
import typer

from antiphon.core.errors import AntiphonError, Problem, SpecInvalid

FAILED = 1
WRONG_USAGE = 2

# typer brings a click of its own, which shares no class with the one that is installed.
_USAGE_ERROR, _CLICK_ERROR = typer.BadParameter.__mro__[1:3]
USAGE_ERRORS: tuple[type[BaseException], ...] = (click.ClickException, _CLICK_ERROR)
ABORTS: tuple[type[BaseException], ...] = (click.Abort, typer.Abort)


def error_lines(error: AntiphonError) -> list[str]:
    """The error in words: a line for each wrong field of a document, else one line."""
    if isinstance(error, SpecInvalid):
        return [problem_line(problem) for problem in error.problems]
    return [str(error)]


def problem_line(problem: Problem) -> str:
    """file:line: path: message."""
    where = problem.source if problem.line is None else f"{problem.source}:{problem.line}"
    parts = (where, "" if problem.path == problem.source else problem.path, problem.message)
    return ": ".join(part for part in parts if part)


def tell(*lines: str, file: IO[str] | None = None) -> None:
    """Print what went wrong, on stderr unless ``file`` says where that is."""
    for line in lines:
        click.echo(f"error: {line}", file=file, err=True)


def tell_usage(error: BaseException) -> int:
    """Print what is wrong with the words of a command line, in one sentence; the exit status."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked: the message is the help
        click.echo(message, err=True)
        return WRONG_USAGE
    known = getattr(error, "possibilities", None)
    if known:
        message = f"no such option: {error.option_name}"  # type: ignore[attr-defined]
        near = difflib.get_close_matches(error.option_name, known, n=1)  # type: ignore[attr-defined]
        message += f"; did you mean {near[0] if near else min(known)}?"
    message = message.replace(": Value error, ", ": ").strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    more = "" if context is None else f" ({context.command_path} --help)"
    tell(f"{message[:1].lower()}{message[1:]}{more}")
    return int(error.exit_code)  # type: ignore[attr-defined]
