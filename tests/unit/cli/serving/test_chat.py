"""``antiphon chat``: the conversation, and the verb in a real pseudo-terminal against a real gRPC server."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.cli.serving.chat import app
from antiphon.cli.serving.chat_session import Piece, Session, Turn, choose_model
from antiphon.client import Client, FinishReason, Message
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.rpc.inference import CallInfo, InferenceServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import inference_pb2 as pb


class Parrot:
    """Repeats the last message in upper case, a word per token; "slow" never ends, "evil" writes escape sequences."""

    def __init__(self) -> None:
        self.models = ["parrot"]
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = threading.Event()

    async def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        self.requests.append(request)
        question = request.chat.messages[-1].content
        if question == "too long":
            raise InvalidInput("the prompt has 9 tokens, 8 fit", "messages")
        yield pb.GenerateResponse(started=pb.Started(request_id="r", model=request.model, seed=1))
        if question == "think":
            for part in (
                pb.Part(thought="Hm."),
                pb.Part(text="I look."),
                pb.Part(call_begin=pb.CallBegin(name="weather")),
                pb.Part(call_arguments=pb.CallArguments(text='{"city": "x"}')),
                pb.Part(call_end=0),
                pb.Part(call_begin=pb.CallBegin(index=1, name="now")),
                pb.Part(call_arguments=pb.CallArguments(index=1, text="{}")),
                pb.Part(call_end=1),
            ):
                yield pb.GenerateResponse(delta=pb.Delta(text="<raw>", token_ids=[1], parts=[part], is_read=True))
            question = ""
        words = ["\x1b[31mred\x07"] if question == "evil" else question.upper().split()
        try:
            for i, word in enumerate(words):
                yield pb.GenerateResponse(delta=pb.Delta(text=word if i == 0 else f" {word}", token_ids=[i]))
            if question == "slow":
                await asyncio.Event().wait()  # until the reader leaves
        except (asyncio.CancelledError, GeneratorExit):  # the reader may leave as soon as it has a word
            self.cancelled.set()
            raise
        yield pb.GenerateResponse(delta=pb.Delta(finish_reason=pb.FINISH_REASON_STOP))
        yield pb.GenerateResponse(completed=pb.Completed())

    async def list_models(self, request: pb.ListModelsRequest, call: CallInfo) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.ModelCard(id=name, ready=name != "sleeping") for name in self.models])

    async def get_status(self, request: pb.GetStatusRequest, call: CallInfo) -> pb.GetStatusResponse:
        return pb.GetStatusResponse()


class Server:
    """An RpcServer on a loop of its own."""

    def __init__(self) -> None:
        self.parrot = Parrot()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.address = self._server.address

    async def _start(self) -> RpcServer:
        server = RpcServer([InferenceServicer(self.parrot)], host="127.0.0.1", public=True)
        await server.start()
        return server

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def said(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == "text")


def test_thoughts_and_calls_are_shown_apart_and_only_calls_are_kept(server: Server) -> None:
    with Client(server.address) as client:
        session = Session(client=client, model="parrot")
        turn = Turn()
        pieces = list(session.ask("think", turn))
    shown = [("thought", "Hm."), ("text", "I look."), ("call", "weather("), ("call", '{"city": "x"}'), ("call", ")")]
    shown += [("call", "now("), ("call", "{}"), ("call", ")")]
    assert [(piece.kind, piece.text) for piece in pieces] == shown
    assert session.history[-1].content == "I look."
    assert [(call.name, call.arguments) for call in session.history[-1].tool_calls] == [
        ("weather", '{"city": "x"}'),
        ("now", "{}"),
    ]


def test_what_calls_gave_is_typed_in_and_goes_back_to_the_model(server: Server, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "weather", "description": "It."}}, {"name": "now"}]))
    asked = ["-e", server.address, "--tools", str(tools), "--effort", "low"]
    result = CliRunner().invoke(app, asked, input="think\nrain\nnoon\nbye\n")
    assert result.stdout == 'I look.\nweather({"city": "x"})\nnow({})\nNOON\nBYE\n'
    assert result.stderr == "thinking:\nHm.\n"
    first, second, third = server.parrot.requests
    assert [(tool.name, tool.description) for tool in first.tools] == [("weather", "It."), ("now", "")]
    assert first.reasoning.effort == "low"
    given = second.chat.messages[-2:]
    assert [(message.role, message.content) for message in given] == [("tool", "rain"), ("tool", "noon")]
    assert [message.tool_call_id for message in given] == [call.id for call in second.chat.messages[1].tool_calls]
    assert third.chat.messages[-1].content == "bye"
    for text in ("{", "7", '["x"]', "[{}]"):
        tools.write_text(text)
        result = CliRunner().invoke(app, [*asked, "-p", "hello"])
        assert result.exit_code != 0
        assert isinstance(result.exception, InvalidInput)
        assert "is no list of tools" in str(result.exception)


def contents(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_each_question_carries_what_was_said_before(server: Server) -> None:
    with Client(server.address) as client:
        session = Session(client=client, model="parrot", system="Be a parrot.")
        assert said(session.ask("hello you", Turn())) == "HELLO YOU"
        assert said(session.ask("again", Turn())) == "AGAIN"
    assert contents(server.parrot.requests[1]) == [
        ("system", "Be a parrot."),
        ("user", "hello you"),
        ("assistant", "HELLO YOU"),
        ("user", "again"),
    ]


def test_a_reset_forgets_all_but_the_system_prompt(server: Server) -> None:
    with Client(server.address) as client:
        session = Session(client=client, model="parrot", system="Be a parrot.")
        said(session.ask("hello", Turn()))
        session.reset()
        said(session.ask("again", Turn()))
    assert contents(server.parrot.requests[1]) == [("system", "Be a parrot."), ("user", "again")]


def test_leaving_an_answer_cancels_it_and_keeps_what_was_read(server: Server) -> None:
    with Client(server.address) as client:
        session = Session(client=client, model="parrot")
        turn = Turn()
        pieces = session.ask("slow", turn)
        assert next(pieces) == Piece("text", "SLOW")
        pieces.close()
        assert server.parrot.cancelled.wait(5)
    assert session.history == [Message(role="user", content="slow"), Message(role="assistant", content="SLOW")]
    assert turn.end is None
    assert turn.summary().endswith("1 tokens, cancelled")


def test_a_question_that_got_nothing_is_forgotten(server: Server) -> None:
    with Client(server.address) as client:
        session = Session(client=client, model="parrot")
        with pytest.raises(InvalidInput):
            said(session.ask("too long", Turn()))
    assert session.history == []


def test_times_are_those_of_the_first_and_the_last_token(server: Server) -> None:
    ticks = iter([10.0, 10.5, 11.0, 12.5])
    with Client(server.address) as client:
        session = Session(client=client, model="parrot", clock=lambda: next(ticks))
        turn = Turn()
        said(session.ask("one two three", turn))
    assert turn.end is FinishReason.STOP
    assert turn.first_token_s == pytest.approx(0.5)
    assert turn.tokens_per_s == pytest.approx(2 / 2.0)
    assert turn.summary() == "first token 0.50 s, 3 tokens, 1.0 tokens/s"


def test_the_only_model_served_is_taken(server: Server) -> None:
    with Client(server.address) as client:
        assert choose_model(client, None) == "parrot"
        assert choose_model(client, "other") == "other"
        server.parrot.models = []
        with pytest.raises(Unavailable, match="no model"):
            choose_model(client, None)
        server.parrot.models = ["parrot", "sleeping"]
        with pytest.raises(InvalidInput, match=r"parrot, sleeping \(not ready\)"):
            choose_model(client, None)


def test_a_prompt_is_answered_once(server: Server) -> None:
    result = CliRunner().invoke(app, ["-e", server.address, "-p", "hello you", "-t", "0", "--max-tokens", "5", "--seed", "3"])
    assert (result.exit_code, result.output) == (0, "HELLO YOU\n")
    sampling = server.parrot.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0.0, 5, 3)
    assert sampling.HasField("temperature")


def test_lines_from_a_pipe_are_a_conversation(server: Server) -> None:
    result = CliRunner().invoke(app, ["-e", server.address], input="hello\n\n/reset\nbye now\n/quit\nnever\n")
    assert result.output == "HELLO\nforgotten\nBYE NOW\n"
    assert contents(server.parrot.requests[1]) == [("user", "bye now")]


def test_an_error_is_told_and_the_conversation_goes_on(server: Server) -> None:
    result = CliRunner().invoke(app, ["-e", server.address], input="hello\ntoo long\nbye\n")
    assert result.exit_code == 0
    assert "the prompt has 9 tokens, 8 fit; /reset starts anew" in result.output
    assert result.output.endswith("BYE\n")


def test_a_model_can_not_steer_the_terminal(server: Server) -> None:
    assert CliRunner().invoke(app, ["-e", server.address, "-p", "evil"]).output == "[31mred\n"


class Terminal:
    """``antiphon chat`` in a pseudo-terminal."""

    def __init__(self, address: str) -> None:
        self._master, slave = pty.openpty()
        program = (
            "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            # As a shell starts it in a terminal: tests that run in the background ignore Ctrl-C, and so would their children.
            "signal.signal(signal.SIGINT, signal.default_int_handler); from antiphon.cli.serving.chat import app; "
            f"app(['-e', {address!r}], prog_name='chat')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, pattern: str, timeout_s: float = 30.0) -> None:
        """Read on until ``pattern`` has come after what was expected before."""
        deadline_s = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.seen)):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{pattern!r} did not come; there is {self.seen!r}"
            if select.select([self._master], [], [], left_s)[0]:
                try:
                    self.seen += os.read(self._master, 4096).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"it ended before {pattern!r}; there is {self.seen!r}") from error
        self.seen = self.seen[match.end() :]

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until ``pattern`` comes: a signal that falls between readline's set-up and its wait counts with the next."""
        for _ in range(20):
            self.type(key)
            try:
                return self.expect(pattern, timeout_s=1.0)
            except AssertionError:
                continue
        raise AssertionError(f"{pattern!r} did not come; there is {self.seen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)


@pytest.fixture
def terminal(server: Server) -> Iterator[Terminal]:
    terminal = Terminal(server.address)
    yield terminal
    terminal.close()


def test_in_a_terminal_control_c_cancels_an_answer_and_control_d_leaves(server: Server, terminal: Terminal) -> None:
    terminal.expect("parrot: .*Ctrl-D leaves")
    terminal.expect("> ")
    terminal.type("hello you\n")
    terminal.expect("HELLO YOU")
    terminal.expect(r"\x1b\[2mfirst token .* s, 2 tokens")
    terminal.expect("> ")
    terminal.type("slow\n")
    terminal.expect("SLOW")
    terminal.type("\x03")
    terminal.expect("cancelled")
    assert server.parrot.cancelled.wait(5)
    terminal.expect("> ")
    terminal.type("half a line")
    terminal.expect("half a line")
    terminal.press_until("\x03", "Ctrl-D leaves")
    terminal.expect("> ")
    terminal.type("still here\n")
    terminal.expect("STILL HERE")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    assert contents(server.parrot.requests[-1])[-2:] == [("assistant", "SLOW"), ("user", "still here")]


def test_in_a_terminal_thoughts_are_dim_and_each_call_is_a_bold_line(server: Server, terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("think\n")
    terminal.expect(r"\x1b\[2mthinking:\x1b\[0m\r\n\x1b\[2mHm\.\x1b\[0m\r\nI look\.\r\n\x1b\[1mweather\(")
    terminal.expect(r"\r\n\x1b\[1mnow\(\x1b\[0m")
    terminal.expect("weather gave> ")
    terminal.type("rain\n")
    terminal.expect("now gave> ")
    terminal.type("noon\n")
    terminal.expect("NOON")
