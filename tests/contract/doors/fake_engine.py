"""A real engine server with a toy model behind it, and a whole gateway over it, for the doors' tests.

The next token is a fixed function of all tokens before it and the seed, so that any worker continues any other's work exactly as
that one would have.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from antiphon.core.budget import Budgets
from antiphon.core.directory import Directory
from antiphon.core.errors import DeadlineExceeded, ErrorInfo, Overloaded
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, RequestTimes, TokenLogprob
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.directory.memory import MemoryDirectory
from antiphon.gateway.app import run_gateway
from antiphon.gateway.config import BoundPorts, GatewayConfig
from antiphon.rpc.engine.server import EngineServicer
from antiphon.rpc.services import RpcServer
from antiphon.telemetry import Telemetry, disabled

MODEL = "tiny"
MAX_MODEL_LEN = 256
LEASE_S = 600.0  # of workers, which nobody renews
EOS = "<|im_end|>"
CORPUS = [
    "The choir answers from the other side of the nave, and the first choir listens.",
    "Où est la bibliothèque? Là-bas, à côté du café — très près.",
    "今日は良い天気ですね。散歩に行きましょう。🎵🎶 👩‍👩‍👧 naïve façade",
    "User: what is it?\nAssistant: it is a song.\n\n1, 2, 3, 4, 5",
] * 3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_checkpoint(
    directory: Path, *, generation_config: dict[str, object] | None = None, chat_template: str = CHAT_TEMPLATE
) -> Path:
    """A directory with everything a gateway reads: a byte-level tokenizer trained here, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "chat_template": chat_template}))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.token_to_id(EOS), **(generation_config or {})})
    )
    return directory


def next_token(tokens: Sequence[int], seed: int, allowed: Sequence[int]) -> int:
    """The toy model."""
    mixed = (sum(tokens[-4:]) * 2654435761 + len(tokens) * 40503 + seed * 97) & 0xFFFFFFFF
    return allowed[(mixed >> 7) % len(allowed)]


def expected_tokens(prompt: Sequence[int], num_tokens: int, *, seed: int = 0, allowed: Sequence[int]) -> list[int]:
    """What an engine answers to a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seed, allowed))
    return tokens[len(prompt) :]


TOO_LATE = ErrorInfo(code=DeadlineExceeded.code, message="deadline exceeded")


@dataclass(slots=True)
class _Running:
    request: Request
    tokens: list[int]
    num_new: int = 0


class FakeEngine:
    """Steps in a thread of its own: each step gives every running request a token."""

    def __init__(
        self,
        allowed: Sequence[int],
        *,
        eos_token_id: int,
        eos_after: int | None = None,
        max_num_seqs: int = 8,
        max_queued: int = 8,
        step_s: float = 0.0005,
        script: Sequence[int] | None = None,
        prepare: Callable[[Request], None] | None = None,
    ) -> None:
        """``script``: every answer is these tokens, then the end; ``prepare``: what a worker does to requests with rules first."""
        self.script = script
        self.prepare = prepare
        self.allowed = list(allowed)
        self.eos_token_id = eos_token_id
        self.eos_after = eos_after
        self.max_num_seqs = max_num_seqs
        self.max_queued = max_queued
        self.step_s = step_s
        self.stop_after_tokens: int | None = None  # freeze each request once it has so many
        self.on_steps: Callable[[Sequence[RequestOutput]], None] = lambda outputs: None
        self.requests: list[Request] = []  # all ever taken in
        self.aborted: list[RequestId] = []
        self.num_vectors = 0
        self._lock = threading.Lock()
        self._live: dict[RequestId, _Running] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)

    def submit(self, request: Request) -> None:
        with self._lock:
            if len(self._live) >= self.max_num_seqs + self.max_queued:
                raise Overloaded("the engine's queue is full", retry_after_s=2.0)
            self.requests.append(request)
            self._live[request.request_id] = _Running(request, [*request.prompt_token_ids, *request.output_token_ids])

    def abort(self, request_id: RequestId) -> None:
        with self._lock:
            self.aborted.append(request_id)
            self._live.pop(request_id, None)

    def _run(self) -> None:
        while not self._closed.wait(self.step_s):
            with self._lock:
                outputs = [self._step(running) for running in list(self._live.values())[: self.max_num_seqs]]
                done = [output for output in outputs if output is not None]
                for output in done:
                    if output.finish_reason is not None:
                        del self._live[output.request_id]
            self.on_steps(done)

    def _step(self, running: _Running) -> RequestOutput | None:
        request = running.request
        now_s = time.monotonic()
        if request.deadline_s is not None and now_s >= request.deadline_s:
            return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT, error=TOO_LATE)
        num_output = len(running.tokens) - len(request.prompt_token_ids)
        if self.stop_after_tokens is not None and num_output >= self.stop_after_tokens:
            return None
        sampling = request.sampling
        if sampling.pooling is not None:
            self.num_vectors += 1
            num_tokens = float(len(request.prompt_token_ids))
            vector = (num_tokens / 64,) if sampling.pooling.kind == "score" else (3.0, 4.0, num_tokens, float(running.tokens[0]))
            return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.LENGTH, vector=vector)
        token = next_token(running.tokens, sampling.seed, self.allowed)
        if self.script is not None:
            token = self.script[num_output] if num_output < len(self.script) else self.eos_token_id
        ends = self.eos_after is not None and num_output >= max(self.eos_after, sampling.min_tokens)
        if ends and not sampling.ignore_eos:
            token = self.eos_token_id
        running.tokens.append(token)
        running.num_new += 1
        finish = stop_token = None
        if token in sampling.stop_token_ids or (token in request.eos_token_ids and not sampling.ignore_eos):
            finish, stop_token = FinishReason.STOP, token
        elif num_output + 1 >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.num_logprobs is not None:
            top = tuple((self.allowed[(token + i) % len(self.allowed)], -1.0 - i) for i in range(sampling.num_logprobs))
            logprobs = (TokenLogprob(token_id=token, logprob=-0.5, rank=0, top=top),)
        of_prompt: dict[int, TokenLogprob] = {}
        if sampling.num_prompt_logprobs is not None and running.num_new == 1:  # all before the first token, as engines give them
            told = enumerate(request.prompt_token_ids)
            of_prompt = {at: TokenLogprob(token_id=each, logprob=-0.5, rank=0, top=()) for at, each in told if at}
        return RequestOutput(
            request_id=request.request_id,
            new_token_ids=(token,),
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
            finish_reason=finish,
            stop_token_id=stop_token,
            num_cached_tokens=3,
            times=RequestTimes(arrival_s=request.arrival_s, scheduled_s=now_s, first_token_s=now_s, finished_s=now_s)
            if finish is not None
            else None,
        )


class FakeWorker:
    """An engine behind a real grpc server, registered in a directory."""

    def __init__(self, directory: Directory, engine: FakeEngine, info: WorkerInfo) -> None:
        self.directory = directory
        self.engine = engine
        self.info = info
        self.servicer: EngineServicer | None = None
        self._server: RpcServer | None = None

    async def start(self) -> None:
        self.servicer = EngineServicer(self.engine, loop=asyncio.get_running_loop(), prepare=self.engine.prepare)
        self.engine.on_steps = self.servicer.deliver
        self._server = RpcServer([self.servicer], host="127.0.0.1")
        await self._server.start()
        self.info = replace(self.info, endpoint=Endpoint(rpc=self._server.address), ready=True)
        await self.register()

    async def register(self, **changes: object) -> None:
        self.info = replace(self.info, **changes)  # type: ignore[arg-type]
        await self.directory.register(self.info, LEASE_S)

    async def die(self) -> None:
        """The process is gone; its lease isn't yet."""
        assert self._server is not None
        await self._server.close()
        self.engine.close()

    async def close(self) -> None:
        await self.die()
        await self.directory.remove(self.info.worker_id, self.info.epoch)


@dataclass(slots=True)
class World:
    """A directory, workers and a gateway."""

    directory: Directory
    checkpoint: Path
    tokenizer: Tokenizer
    allowed: list[int]
    ports: BoundPorts
    stop: asyncio.Event
    workers: list[FakeWorker] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc_port}"

    @property
    def engine(self) -> FakeEngine:
        return self.workers[0].engine

    async def add_worker(self, name: str, *, epoch: int = 1, **options: object) -> FakeWorker:
        worker = make_worker(self.directory, name, self.tokenizer, self.allowed, epoch=epoch, **options)
        worker.engine.start()
        await worker.start()
        self.workers.append(worker)
        return worker

    def text_of(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def tokens_of(self, prompt: str, num_tokens: int, seed: int = 0) -> list[int]:
        return expected_tokens(self.tokenizer.encode(prompt).ids, num_tokens, seed=seed, allowed=self.allowed)

    def chat_tokens_of(self, content: str, num_tokens: int, seed: int = 0) -> list[int]:
        return self.tokens_of(f"<|im_start|>user\n{content}{EOS}\n<|im_start|>assistant\n", num_tokens, seed)


def make_worker(
    directory: Directory,
    name: str,
    tokenizer: Tokenizer,
    allowed: Sequence[int],
    *,
    epoch: int = 1,
    max_model_len: int = MAX_MODEL_LEN,
    **options: object,
) -> FakeWorker:
    engine = FakeEngine(allowed, eos_token_id=tokenizer.token_to_id(EOS), **options)  # type: ignore[arg-type]
    info = WorkerInfo(
        worker_id=WorkerId(f"demo/monolith/{name}"),
        deployment="demo",
        pool="monolith",
        role=Role.MONOLITH,
        model=MODEL,
        revision="r1",
        fingerprint="f1",
        epoch=Epoch(epoch),
        endpoint=Endpoint(rpc=""),
        pid=1,
        host="localhost",
        max_model_len=max_model_len,
        vocab_size=tokenizer.get_vocab_size(),
        block_size_tokens=16,
        max_num_seqs=engine.max_num_seqs,
        max_queued_requests=engine.max_queued,
        load=WorkerLoad(num_free_blocks=75, num_total_blocks=100),
    )
    return FakeWorker(directory, engine, info)


@asynccontextmanager
async def world(
    tmp_path: Path,
    *,
    workers: Sequence[str] = ("0",),
    telemetry: Telemetry | None = None,
    gateway: dict[str, object] | None = None,
    generation_config: dict[str, object] | None = None,
    chat_template: str = CHAT_TEMPLATE,
    budgets: Budgets | None = None,
    directory: Directory | None = None,
    **engine_options: object,
) -> AsyncIterator[World]:
    """Everything running on loopback sockets; on the way out it stops and must have stopped cleanly.

    ``directory``: one that outlives this gateway or is shared with another; None = its own, in memory.
    """
    checkpoint = make_checkpoint(tmp_path / "checkpoint", generation_config=generation_config, chat_template=chat_template)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    allowed = [i for i in range(tokenizer.get_vocab_size()) if not tokenizer.id_to_token(i).startswith("<")]
    directory = directory or MemoryDirectory()
    stop = asyncio.Event()
    bound: asyncio.Future[BoundPorts] = asyncio.get_running_loop().create_future()
    config = GatewayConfig(
        **{  # type: ignore[arg-type]
            "models": {MODEL: checkpoint},
            "http_port": 0,
            "grpc_port": 0,
            "refresh_s": 0.02,
            "drain_timeout_s": 2.0,
            **(gateway or {}),
        }
    )
    made = World(
        directory=directory,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        allowed=allowed,
        ports=BoundPorts(host="", http_port=0, grpc_port=0),
        stop=stop,
    )
    for name in workers:
        await made.add_worker(name, **engine_options)
    serving = asyncio.create_task(
        run_gateway(
            config, directory, stop, on_bound=bound.set_result, notes=directory, telemetry=telemetry or disabled(), budgets=budgets
        )
    )
    try:
        await asyncio.wait({serving, bound}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        if serving.done():
            serving.result()
        made.ports = bound.result()
        yield made
    finally:
        stop.set()
        try:
            async with asyncio.timeout(15):
                await serving
        finally:  # a gateway that did not start raises again; a server left open holds up whoever ends gRPC's poller later
            for worker in made.workers:
                await worker.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds, for a bounded time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def said(blocks: Iterable[str]) -> str:
    """The text of a stream's events, in any door's shape, one choice behind the other: how it is cut is left out."""
    text = ""
    by_choice: dict[int, str] = {}
    for block in blocks:
        data = block.rpartition("data: ")[2]
        body = {} if data == "[DONE]" else json.loads(data)
        for choice in body.get("choices", ()):
            more = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            by_choice[choice["index"]] = by_choice.get(choice["index"], "") + more
        match body.get("type"), body.get("delta"):
            case "response.output_text.delta", str(delta):
                text += delta
            case "content_block_delta", dict(delta):
                text += delta.get("text", "")
    return text + "".join(more for _, more in sorted(by_choice.items()))


def kind(block: str) -> str:
    """What an event is, without its id and what its cut decides."""
    rest = block.partition("\n")[2] if block.startswith("id: ") else block
    return rest.partition("\n")[0] if rest.startswith("event: ") else rest.partition('"created"')[0]
