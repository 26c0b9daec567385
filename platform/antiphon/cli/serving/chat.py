"""``antiphon chat``: talk to a served model in the terminal, with tokens as they come (request speed).

Ctrl-C cancels the running answer and Ctrl-D leaves. Thoughts are dim, under a heading of their own; each call is a line, and what
its function gives is typed in. Where nobody looks on, thoughts go to stderr. Must not know: how answers are computed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from antiphon.cli.errors import error_lines, tell
from antiphon.cli.serving.chat_session import Piece, Session, Turn, choose_model
from antiphon.cli.serving.connection import DEFAULT, IS_IT_RUNNING, ApiKey, CaFile, Endpoint, connect
from antiphon.client import GenerateOptions, Tool
from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_Said = TypeVar("_Said")
_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C cancels a running answer"


@app.command()
def chat(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to talk to; default: the only one served.")] = None,
    endpoint: Endpoint = DEFAULT,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this once and leave.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0 = always the most probable token.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Share of probability to draw from.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Equal seeds give equal answers.")] = None,
    tools: Annotated[
        Path | None, typer.Option("--tools", help="JSON file with a list of tools, as OpenAI's requests have.")
    ] = None,
    effort: Annotated[str | None, typer.Option("--effort", help="How much it thinks: none, minimal, low, medium, high.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds an answer may take.")] = 600.0,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Chat with a served model."""
    options: GenerateOptions = {"timeout_s": timeout_s}
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if seed is not None:
        options["seed"] = seed
    if effort is not None:
        options["reasoning_effort"] = effort
    if tools is not None:
        options["tools"] = tools_in(tools)
    with connect(endpoint, api_key, ca_file) as client:
        session = Session(client=client, model=choose_model(client, model), system=system, options=options)
        if prompt is not None:
            if _answer(session.ask, prompt).end is None:
                raise typer.Exit(130)  # cancelled by Ctrl-C
            return
        _converse(session)


def _converse(session: Session) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
        typer.echo(_dim(f"{session.model}: {_HELP}"))
    results: list[str] = []  # of calls that wait for them
    while True:
        calls = session.waiting_calls
        name = calls[len(results)].name if calls else ""
        try:
            line = input(f"{_printable(name)} gave> " if interactive and name else "> " if interactive else "").strip()
        except EOFError:
            if interactive:
                typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            typer.echo(_dim("Ctrl-D leaves"))
            continue
        match line:
            case "" if not name:
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                session.reset()
                results.clear()
                typer.echo(_dim("forgotten"))
            case "/help":
                typer.echo(_dim(_HELP))
            case _ if line.startswith("/") and " " not in line:
                typer.echo(_dim(f"unknown command {line}; {_HELP}"))
            case _:
                try:
                    if name:
                        results.append(line)
                        if len(results) == len(calls):
                            given, results = results, []
                            _answer(session.give, given)
                    else:
                        _answer(session.ask, line)
                except InvalidInput as error:
                    hint = "; /reset starts anew" if session.history else ""
                    tell(f"{error}{hint}")
                except Unavailable as error:
                    tell(f"{error}; {IS_IT_RUNNING}")
                except AntiphonError as error:
                    tell(*error_lines(error))


def tools_in(path: Path) -> list[Tool]:
    """Tools of a file, each ``{"type": "function", "function": {...}}`` or the function alone.

    Raises:
        InvalidInput: it can't be read, or is no list of tools.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        functions = [each.get("function", each) for each in found]
        return [
            Tool(
                name=each["name"],
                description=each.get("description") or "",
                parameters=each.get("parameters") or {},
                strict=bool(each.get("strict")),
            )
            for each in functions
        ]
    except OSError as error:
        raise InvalidInput(f"--tools {path} can't be read: {error.strerror}", "tools") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InvalidInput(f"--tools {path} is no list of tools: {type(error).__name__} {error}", "tools") from error


def _answer(ask: Callable[[_Said, Turn], Generator[Piece, None, None]], said: _Said) -> Turn:
    """Ask and print; Ctrl-C cancels."""
    turn = Turn()
    pieces = ask(said, turn)
    looked_at = sys.stdout.isatty()
    try:
        shown = None
        for piece in pieces:
            aside = piece.kind == "thought" and not looked_at
            if shown is not None and (piece.begins or shown != piece.kind):
                typer.echo(err=shown == "thought" and not looked_at)
            if piece.kind == "thought" and shown != "thought":
                typer.echo(_dim("thinking:"), err=aside)
            shown = piece.kind
            typer.echo(_STYLES[piece.kind](_printable(piece.text)), nl=False, err=aside)
            sys.stdout.flush()
    except KeyboardInterrupt:
        turn.end = None
    finally:
        pieces.close()  # cancels the call unless it has ended
        if turn.first_token_s is not None:
            typer.echo()
    if sys.stdout.isatty():
        typer.echo(_dim(turn.summary()))
    return turn


def _printable(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def _dim(text: str) -> str:
    return typer.style(text, dim=True)


def _bold(text: str) -> str:
    return typer.style(text, bold=True)


_STYLES: Mapping[str, Callable[[str], str]] = {"text": str, "thought": _dim, "call": _bold}
