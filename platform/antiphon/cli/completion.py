"""``antiphon completion``: the lines that let a shell complete verbs, options and their values (control speed).

click's own completion walks the verbs; a verb's words are completed here, from the verb's own command.

Must not know: what any verb does.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer
from click.shell_completion import CompletionItem, get_completion_class

app = typer.Typer(add_completion=False, rich_markup_mode=None)

VARIABLE = "_ANTIPHON_COMPLETE"


@app.command()
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.")]) -> None:
    """Print the lines that let a shell complete `antiphon`; evaluate them in its start file.

    bash: eval "$(antiphon completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc. fish: antiphon completion fish
    > ~/.config/fish/completions/antiphon.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click has these three
    click.echo(made(click.Command("antiphon"), {}, "antiphon", VARIABLE).source())


def complete_words(command: Any, words: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """What may stand in ``incomplete``'s place after ``words`` of the verb ``command``."""
    words = list(words)
    while (below := _commands(command)) and (at := next((i for i, word in enumerate(words) if word in below), None)) is not None:
        command, words = below[words[at]], words[at + 1 :]
    options = [param for param in command.params if param.param_type_name == "option" and not getattr(param, "hidden", False)]
    if words and words[-1].startswith("-"):
        asked = next((param for param in options if words[-1] in param.opts and not _is_flag(param)), None)
        if asked is not None:
            return list(_values(command, asked, incomplete))
    if incomplete.startswith("-"):
        found = [(name, param.help) for param in options for name in (*param.opts, *param.secondary_opts)] + [("--help", None)]
        return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete) and name.startswith("--")]
    if below := _commands(command):
        return [CompletionItem(name, help=one.get_short_help_str()) for name, one in below.items() if name.startswith(incomplete)]
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    return [] if not arguments else list(_values(command, arguments[0], incomplete))


def _commands(command: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(command, "commands", {})
    return {name: one for name, one in found.items() if not one.hidden}


def _is_flag(param: Any) -> bool:
    return bool(getattr(param, "is_flag", False) or getattr(param, "count", False))


def _values(command: Any, param: Any, incomplete: str) -> Iterator[CompletionItem]:
    """The choices of an option or argument, as its annotation has them; files for paths, and for arguments of text."""
    kinds = list(_kinds(typing.get_type_hints(inspect.unwrap(command.callback))[param.name]))
    choices = [str(choice) for kind in kinds for choice in _choices(kind)]
    yield from (CompletionItem(choice) for choice in choices if choice.startswith(incomplete))
    if not choices and (Path in kinds or param.param_type_name == "argument"):
        yield CompletionItem(incomplete, type="file")


def _kinds(annotation: Any) -> Iterator[Any]:
    inner = typing.get_args(annotation)
    if not inner or typing.get_origin(annotation) is Literal:
        yield annotation
        return
    for one in inner:
        yield from _kinds(one)


def _choices(kind: Any) -> Iterator[object]:
    if typing.get_origin(kind) is Literal:
        yield from typing.get_args(kind)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        yield from (member.value for member in kind)
