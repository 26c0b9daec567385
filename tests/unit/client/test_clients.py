"""Both clients against a real server in this process: streaming, cancellation, deadlines, retries, errors.

Every test runs with the blocking client and with the asyncio client, the latter driven from outside its loop.
"""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from antiphon.client import AsyncClient, AsyncStream, Chunk, Client, Completion, FinishReason, Message, RetryPolicy, Stream, Tls
from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from antiphon.rpc.inference import CallInfo, InferenceServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import inference_pb2 as pb
from antiphon.rpc.v1.inference_pb2_grpc import InferenceServicer as InferenceServicerStub
from antiphon.rpc.v1.inference_pb2_grpc import add_InferenceServicer_to_server

FAST = RetryPolicy(max_attempts=3, initial_s=0.01, max_s=0.02)


class Script:
    """Answers as the model's name says, and remembers what it saw."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.calls: list[CallInfo] = []
        self.cancelled = threading.Event()
        self.num_attempts = 0

    async def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        self.requests.append(request)
        self.calls.append(call)
        self.num_attempts += 1
        match request.model:
            case "busy-twice" if self.num_attempts <= 2:
                raise Overloaded("queue is full", 0.01)
            case "busy":
                raise Overloaded("queue is full", 0.02)
            case "busy-for-long":
                raise Overloaded("queue is full", 3600.0)
            case "wrong":
                raise InvalidInput("must be at most 1", "sampling.top_p")
            case "unknown":
                raise UnknownModel("no model 'unknown'", "model")
            case "locked" if call.metadata.get("authorization") != "Bearer secret":
                raise Unauthenticated("a key is needed")
            case "goes-on" if request.resume:
                async for response in self._rest(request):
                    yield response
                return
            case "broken":
                raise RuntimeError("an invariant of the server's")
        yield pb.GenerateResponse(
            started=pb.Started(request_id="r1", model=request.model, seed=7, num_prompt_tokens=3, created=1000)
        )
        if request.model == "lost-before-token" and self.num_attempts == 1:
            raise Unavailable("worker lost", 0.0)
        try:
            if request.model == "silent":
                await asyncio.Event().wait()  # until the reader leaves
            for i, word in enumerate(["Hello", " wor", "ld"]):
                for index in range(max(1, request.num_choices)):
                    yield pb.GenerateResponse(delta=pb.Delta(index=index, text=word, token_ids=[10 + i]))
                if request.model in ("lost-after-token", "goes-on"):
                    raise Unavailable("worker lost", 0.0)
                if request.model == "slow":
                    await asyncio.Event().wait()  # until the reader leaves
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        for index in range(max(1, request.num_choices)):
            yield pb.GenerateResponse(delta=pb.Delta(index=index, finish_reason=pb.FINISH_REASON_STOP, stop_string="!"))
        if request.model != "ends-early":
            yield pb.GenerateResponse(completed=pb.Completed(usage=pb.Usage(num_prompt_tokens=3, num_completion_tokens=3)))

    async def _rest(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        num_had = len(request.resume[0].token_ids)
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id, model=request.model, seed=7))
        for i, word in list(enumerate(["Hello", " wor", "ld"]))[num_had:]:
            yield pb.GenerateResponse(delta=pb.Delta(text=word, token_ids=[10 + i]))
            if self.num_attempts == 2:
                raise Unavailable("worker lost again", 0.0)
        yield pb.GenerateResponse(delta=pb.Delta(finish_reason=pb.FINISH_REASON_LENGTH))
        yield pb.GenerateResponse(completed=pb.Completed(usage=pb.Usage(num_completion_tokens=3)))

    async def list_models(self, request: pb.ListModelsRequest, call: CallInfo) -> pb.ListModelsResponse:
        self.num_attempts += 1
        if self.num_attempts == 1:
            raise Unavailable("starting", 0.01)
        return pb.ListModelsResponse(models=[pb.ModelCard(id="m", max_model_len=64, created=5, ready=True, revision="a")])

    async def get_status(self, request: pb.GetStatusRequest, call: CallInfo) -> pb.GetStatusResponse:
        worker = pb.WorkerStatus(
            worker_id="demo/ffn/0",
            role="ffn",
            epoch=3,
            lease_remaining_s=2.5,
            load=pb.WorkerLoadStatus(num_ffn_rows=9, num_total_blocks=4, num_free_blocks=1, gauges={"x": 1.5}),
        )
        return pb.GetStatusResponse(
            gateway=pb.GatewayStatus(version="1", uptime_s=3.0),
            pools=[pb.PoolStatus(name="ffn", deployment=request.deployment, num_workers=1)],
            workers=[worker],
        )


class Server:
    """An RpcServer on a loop of its own."""

    def __init__(self) -> None:
        self.script = Script()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._start())
        self.address = self._server.address

    async def _start(self) -> RpcServer:
        server = RpcServer([InferenceServicer(self.script)], host="127.0.0.1", public=True)
        await server.start()
        return server

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def close(self) -> None:
        self._run(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class DrivenStream:
    """An AsyncStream behind Stream's face."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: AsyncStream) -> None:
        self._loop, self.stream = loop, stream

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._loop.run_until_complete(anext(self.stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> DrivenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def completion(self) -> Completion:
        return self._loop.run_until_complete(self.stream.completion())

    def close(self) -> None:
        self._loop.run_until_complete(self.stream.close())


class DrivenClient:
    """An AsyncClient behind Client's face."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self.client = AsyncClient(*args, **kwargs)

    def stream(self, model: str, **options: Any) -> DrivenStream:
        return DrivenStream(self._loop, self.client.stream(model, **options))

    def generate(self, model: str, **options: Any) -> Completion:
        return self._loop.run_until_complete(self.client.generate(model, **options))

    def list_models(self, **kwargs: Any) -> Any:
        return self._loop.run_until_complete(self.client.list_models(**kwargs))

    def status(self, *args: Any) -> Any:
        return self._loop.run_until_complete(self.client.status(*args))

    def close(self) -> None:
        self._loop.run_until_complete(self.client.close())


Connect = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(params=[Client, DrivenClient], ids=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    opened: list[Any] = []

    def make(address: str, **kwargs: Any) -> Any:
        opened.append(request.param(address, **{"retry": FAST, "timeout_s": 20.0, **kwargs}))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def test_a_stream_brings_chunks_and_then_usage(server: Server, connect: Connect) -> None:
    with connect(server.address).stream("m", prompt="x") as stream:
        chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["Hello", " wor", "ld", ""]
    assert [chunk.token_ids for chunk in chunks] == [(10,), (11,), (12,), ()]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].stop_string == "!"
    assert chunks[-1].stop_token_id is None
    assert stream.request_id == "r1"
    assert stream.usage.num_completion_tokens == 3


def test_generate_gathers_every_choice(server: Server, connect: Connect) -> None:
    completion = connect(server.address).generate("m", prompt="x", n=2)
    assert [choice.text for choice in completion.choices] == ["Hello world", "Hello world"]
    assert completion.text == "Hello world"
    assert completion.choices[1].token_ids == (10, 11, 12)
    assert (completion.seed, completion.created, completion.model) == (7, 1000, "m")
    assert server.script.requests[0].num_choices == 2


def test_what_is_asked_arrives_as_asked(server: Server, connect: Connect) -> None:
    connect(server.address).generate(
        "m",
        messages=[Message(role="system", content="Be brief."), {"role": "user", "content": "Hi ☺"}],
        temperature=0.0,
        seed=2**64 - 1,
        max_tokens=5,
        stop="\n",
        logit_bias={3: -100.0},
        num_logprobs=0,
        speculation="off",
        request_id="mine",
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    )
    (request,) = server.script.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "Be brief."), ("user", "Hi ☺")]
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0
    assert not request.sampling.HasField("top_p")
    assert request.sampling.seed == 2**64 - 1
    assert list(request.stop) == ["\n"]
    assert dict(request.sampling.logit_bias) == {3: -100.0}
    assert request.HasField("num_logprobs")
    assert request.request_id == "mine"
    assert request.sampling.speculation == "off"
    assert server.script.calls[0].metadata["traceparent"].startswith("00-aaaa")
    assert 0 < (server.script.calls[0].deadline_left_s or 0) <= 21  # gRPC rounds what it sends up


def test_closing_a_stream_cancels_on_the_server(server: Server, connect: Connect) -> None:
    stream = connect(server.address).stream("slow", prompt="x")
    assert next(iter(stream)).text == "Hello"
    stream.close()
    assert server.script.cancelled.wait(5)
    assert list(stream) == []
    assert stream.completion().choices[0].finish_reason is None
    stream.close()


def test_leaving_the_with_block_cancels_on_the_server(server: Server, connect: Connect) -> None:
    with connect(server.address).stream("slow", prompt="x") as stream:
        next(iter(stream))
    assert server.script.cancelled.wait(5)


def test_closing_from_elsewhere_ends_a_waiting_blocking_stream(server: Server) -> None:
    with Client(server.address, retry=FAST) as client:
        stream = client.stream("slow", prompt="x")
        next(stream)
        closer = threading.Timer(0.1, stream.close)
        closer.start()
        with pytest.raises(Cancelled):
            next(stream)
        closer.join()
    assert server.script.cancelled.wait(5)


async def test_cancelling_the_task_cancels_on_the_server(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        arrived = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("slow", prompt="x"):
                arrived.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(arrived.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.script.cancelled.wait, 5)


async def test_closing_from_another_task_ends_a_waiting_stream(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.stream("slow", prompt="x")
        await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await stream.close()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("model", ["silent", "slow"])
def test_a_deadline_ends_the_call_at_both_ends(server: Server, connect: Connect, model: str) -> None:
    with pytest.raises(DeadlineExceeded):
        connect(server.address).generate(model, prompt="x", timeout_s=0.3)
    assert server.script.cancelled.wait(5)
    assert server.script.num_attempts == 1


def test_a_refusal_is_tried_again_until_it_succeeds(server: Server, connect: Connect) -> None:
    assert connect(server.address).generate("busy-twice", prompt="x").text == "Hello world"
    assert server.script.num_attempts == 3


def test_patience_ends_with_the_servers_own_error(server: Server, connect: Connect) -> None:
    with pytest.raises(Overloaded, match="queue is full") as caught:
        connect(server.address).generate("busy", prompt="x")
    assert caught.value.retry_after_s == pytest.approx(0.02)
    assert server.script.num_attempts == 3


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server: Server, connect: Connect) -> None:
    with pytest.raises(Overloaded) as caught:
        connect(server.address).generate("busy-for-long", prompt="x")
    assert caught.value.retry_after_s == 3600.0
    assert server.script.num_attempts == 1


def test_a_loss_before_the_first_token_is_tried_again(server: Server, connect: Connect) -> None:
    assert connect(server.address).generate("lost-before-token", prompt="x").text == "Hello world"
    assert server.script.num_attempts == 2


def test_an_answer_goes_on_behind_its_tokens_when_its_connection_is_lost(server: Server, connect: Connect) -> None:
    completion = connect(server.address).generate("goes-on", prompt="x", max_tokens=3)
    assert completion.text == "Hello world"
    assert completion.choices[0].token_ids == (10, 11, 12)
    assert completion.choices[0].finish_reason is FinishReason.LENGTH
    first, second, third = server.script.requests
    assert not first.sampling.HasField("seed")
    assert (second.request_id, second.sampling.seed, second.sampling.max_tokens) == ("r1", 7, 3)
    assert [list(part.token_ids) for part in second.resume] == [[10]]
    assert [list(part.token_ids) for part in third.resume] == [[10, 11]]


def test_an_answer_that_may_not_go_on_is_the_applications_to_handle(server: Server, connect: Connect) -> None:
    never = RetryPolicy(max_attempts=3, initial_s=0.01, resume=False)
    stream = connect(server.address, retry=never).stream("lost-after-token", prompt="x")
    assert next(iter(stream)).text == "Hello"
    with pytest.raises(Unavailable, match="worker lost"):
        list(stream)
    assert server.script.num_attempts == 1
    assert stream.completion().text == "Hello"


def test_an_answer_without_its_end_is_not_taken_for_whole(server: Server, connect: Connect) -> None:
    with pytest.raises(Unavailable, match="ended early"):
        connect(server.address).generate("ends-early", prompt="x")
    assert server.script.num_attempts == 1


def test_bad_input_names_the_field_and_is_not_tried_again(server: Server, connect: Connect) -> None:
    with pytest.raises(InvalidInput, match="at most 1") as caught:
        connect(server.address).generate("wrong", prompt="x")
    assert caught.value.field == "sampling.top_p"
    assert server.script.num_attempts == 1


@pytest.mark.parametrize(("model", "kind"), [("unknown", UnknownModel), ("locked", Unauthenticated), ("broken", InternalError)])
def test_the_servers_errors_come_back_as_themselves(
    server: Server, connect: Connect, model: str, kind: type[AntiphonError]
) -> None:
    with pytest.raises(kind) as caught:
        connect(server.address).generate(model, prompt="x")
    assert type(caught.value) is kind
    assert "invariant" not in str(caught.value)
    assert server.script.num_attempts == 1


def test_the_key_travels_as_a_bearer_token(server: Server, connect: Connect) -> None:
    assert connect(server.address, api_key="secret").generate("locked", prompt="x").text == "Hello world"


def test_nobody_listening_is_unavailable(connect: Connect) -> None:
    with pytest.raises(Unavailable):
        connect("127.0.0.1:1").generate("m", prompt="x")
    with pytest.raises(Unavailable):
        connect("127.0.0.1:1").list_models()


def test_reads_are_tried_again_too(server: Server, connect: Connect) -> None:
    (model,) = connect(server.address).list_models()
    assert (model.id, model.max_model_len, model.ready) == ("m", 64, True)
    assert server.script.num_attempts == 2


def test_status_comes_typed(server: Server, connect: Connect) -> None:
    status = connect(server.address).status("demo")
    (worker,) = status.workers
    assert status.pools[0].deployment == "demo"
    assert (worker.epoch, worker.lease_remaining_s, worker.connected) == (3, 2.5, None)
    assert worker.load.num_ffn_rows == 9
    assert worker.load.gauges == {"x": 1.5}
    assert worker.kv_usage == pytest.approx(0.75)


def test_a_closed_client_refuses(server: Server, connect: Connect) -> None:
    client = connect(server.address)
    client.generate("m", prompt="x")
    client.close()
    with pytest.raises(Cancelled):
        client.generate("m", prompt="x")


def self_signed(name: str) -> tuple[bytes, bytes]:
    """A private key and a certificate for ``name``, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), certificate.public_bytes(pem)


def test_a_tls_server_is_trusted_by_its_authority_and_name(connect: Connect) -> None:
    class Models(InferenceServicerStub):
        def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
            return pb.ListModelsResponse(models=[pb.ModelCard(id="m")])

    key, certificate = self_signed("gateway.test")
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    add_InferenceServicer_to_server(Models(), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        trusted = Tls(root_certificates=certificate, server_name="gateway.test")
        assert connect(f"127.0.0.1:{port}", tls=trusted).list_models()[0].id == "m"
        misnamed = Tls(root_certificates=certificate, server_name="other.test")
        with pytest.raises(Unavailable):
            connect(f"127.0.0.1:{port}", tls=misnamed).list_models()
    finally:
        server.stop(None).wait()


def test_many_threads_share_one_client(server: Server) -> None:
    texts: list[str] = []
    with Client(server.address) as client:
        threads = [threading.Thread(target=lambda: texts.append(client.generate("m", prompt="x").text)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert texts == ["Hello world"] * 16


def test_a_pause_between_attempts_ends_with_the_stream(server: Server) -> None:
    with Client(server.address, retry=RetryPolicy(initial_s=10.0, max_s=10.0)) as client:
        stream: Stream = client.stream("busy", prompt="x")
        started = time.monotonic()
        threading.Timer(0.1, stream.close).start()
        assert list(stream) == []
        assert time.monotonic() - started < 4.0
