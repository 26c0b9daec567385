"""A shell completes every verb, every option and the choices of both; what is mistyped gets a suggestion."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import typer

from antiphon.cli import VERBS
from antiphon.cli.completion import complete_words

VERB_COMMANDS = {name: typer.main.get_command(importlib.import_module(f"antiphon.cli.{v.module}").app) for name, v in VERBS.items()}


def _commands(command, words=()):
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _commands(below, (*words, name))


def completed(verb, *words):
    *before, incomplete = words
    return [item.value for item in complete_words(VERB_COMMANDS[verb], before, incomplete)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_and_every_verb_below_is_completed(verb):
    for words, command in _commands(VERB_COMMANDS[verb]):
        options = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
        names = {name for param in options for name in (*param.opts, *param.secondary_opts)}
        assert set(completed(verb, *words, "--")) == {name for name in names if name.startswith("--")} | {"--help"}
        if below := getattr(command, "commands", {}):
            assert completed(verb, *words, "") == [name for name, one in below.items() if not one.hidden]
        for param in command.params:
            complete_words(command, [param.opts[0]], "")  # whatever its values are


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("serve", "--topology", ""), ["monolith", "pd", "afd", "pd-afd"]),
        (("serve", "--topology", "pd"), ["pd", "pd-afd"]),
        (("plan", "de"), ["deploy"]),
        (("completion", "z"), ["zsh"]),
        (("status", "--deployment", "x", "--wa"), ["--watch"]),
    ],
)
def test_values_are_those_that_a_verb_takes(words, expected):
    assert completed(*words) == expected


def test_a_path_is_completed_by_the_shell():
    assert [item.type for item in complete_words(VERB_COMMANDS["validate"], ["-f"], "dep")] == ["file"]


def test_bash_completes_what_the_printed_lines_tell_it():
    run = f"{sys.executable} -c 'from antiphon.cli import main; main()'"
    script = (
        f'antiphon() {{ {run} "$@"; }}; eval "$(antiphon completion bash)"; '
        'complete_in() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _ANTIPHON_COMPLETE=bash_complete COMP_WORDS="$*" '
        "COMP_CWORD=$(($#-1)) antiphon; }; type -t _antiphon_completion; complete -p antiphon; complete_in antiphon serve --gr"
    )
    said = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "function" in said
    assert "complete -o nosort -F _antiphon_completion antiphon" in said
    assert said.splitlines()[-1] == "plain,--grpc-port"
