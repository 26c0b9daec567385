"""``antiphon chat``: talk to a served model in the terminal, with tokens as they come (request speed).

Ctrl-C cancels the running answer and Ctrl-D leaves. Must not know: how answers are computed.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from antiphon.cli.errors import error_lines, tell
from antiphon.cli.serving.chat_session import Session, Turn, choose_model
from antiphon.cli.serving.connection import DEFAULT, IS_IT_RUNNING, ApiKey, CaFile, Endpoint, connect
from antiphon.client import GenerateOptions
from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable

app = typer.Typer(add_completion=False, rich_markup_mode=None)

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
    with connect(endpoint, api_key, ca_file) as client:
        session = Session(client=client, model=choose_model(client, model), system=system, options=options)
        if prompt is not None:
            if _answer(session, prompt).end is None:
                raise typer.Exit(130)  # cancelled by Ctrl-C
            return
        _converse(session)


def _converse(session: Session) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
        typer.echo(_dim(f"{session.model}: {_HELP}"))
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            typer.echo(_dim("Ctrl-D leaves"))
            continue
        match line:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                session.reset()
                typer.echo(_dim("forgotten"))
            case "/help":
                typer.echo(_dim(_HELP))
            case _ if line.startswith("/") and " " not in line:
                typer.echo(_dim(f"unknown command {line}; {_HELP}"))
            case _:
                try:
                    _answer(session, line)
                except InvalidInput as error:
                    hint = "; /reset starts anew" if session.history else ""
                    tell(f"{error}{hint}")
                except Unavailable as error:
                    tell(f"{error}; {IS_IT_RUNNING}")
                except AntiphonError as error:
                    tell(*error_lines(error))


def _answer(session: Session, text: str) -> Turn:
    """Ask and print; Ctrl-C cancels."""
    turn = Turn()
    pieces = session.ask(text, turn)
    try:
        shown = None
        for piece in pieces:
            if shown not in (None, piece.kind):
                typer.echo()
            shown = piece.kind
            text = _printable(piece.text)
            typer.echo(
                text if piece.kind == "text" else typer.style(text, dim=piece.kind == "thought", bold=piece.kind == "call"),
                nl=False,
            )
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
