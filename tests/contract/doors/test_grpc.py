"""The gRPC door over loopback sockets."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from antiphon.core.errors import (
    AntiphonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from antiphon.gateway.access.key_lines import key_line
from antiphon.rpc.channels import open_channel
from antiphon.rpc.errors import error_from_call
from antiphon.rpc.v1 import experts_pb2, experts_pb2_grpc, inference_pb2_grpc
from antiphon.rpc.v1 import inference_pb2 as pb

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path) as made:
        yield made


@pytest.fixture
async def channel(world: fake.World) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(world.grpc_address) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


def request(**fields: object) -> pb.GenerateRequest:
    merged = {"model": "tiny", "prompt": "The choir", "sampling": pb.Sampling(max_tokens=20, seed=5), **fields}
    if "chat" in fields or "tokens" in fields:
        del merged["prompt"]
    return pb.GenerateRequest(**merged)  # type: ignore[arg-type]


async def events(
    stub: inference_pb2_grpc.InferenceStub, message: pb.GenerateRequest, timeout_s: float = 20
) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(message, timeout=timeout_s)]


async def error_of(stub: inference_pb2_grpc.InferenceStub, message: pb.GenerateRequest, timeout_s: float = 20) -> AntiphonError:
    with pytest.raises(grpc.RpcError) as caught:
        await events(stub, message, timeout_s)
    return error_from_call(caught.value)


async def test_an_answer_is_started_deltas_and_completed(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    first, *deltas, last = await events(stub, request())
    tokens = world.tokens_of("The choir", 20, seed=5)
    assert first.started.seed == 5
    assert first.started.num_prompt_tokens == len(world.tokenizer.encode("The choir").ids)
    assert [token for event in deltas for token in event.delta.token_ids] == tokens
    assert "".join(event.delta.text for event in deltas) == world.text_of(tokens)
    assert deltas[-1].delta.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.completed.usage.num_completion_tokens == 20
    assert last.completed.usage.num_cached_tokens == 3
    assert 0 < last.completed.usage.first_token_s <= last.completed.usage.finished_s


async def test_a_chat_and_token_ids_are_inputs_too(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="what is it?")])
    answer = await events(stub, request(chat=chat))
    assert "".join(e.delta.text for e in answer) == world.text_of(world.chat_tokens_of("what is it?", 20, seed=5))
    ids = pb.TokenIds(ids=world.tokenizer.encode("The choir").ids)
    answer = await events(stub, request(tokens=ids))
    assert "".join(e.delta.text for e in answer) == world.text_of(world.tokens_of("The choir", 20, seed=5))


async def test_choices_are_told_apart(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    texts = {0: "", 1: ""}
    for event in await events(stub, request(num_choices=2)):
        texts[event.delta.index] += event.delta.text
    assert texts == {i: world.text_of(world.tokens_of("The choir", 20, seed=5 + i)) for i in range(2)}


async def test_logprobs_come_one_per_token(stub: inference_pb2_grpc.InferenceStub) -> None:
    deltas = [event.delta for event in await events(stub, request(num_logprobs=2)) if event.HasField("delta")]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    first = deltas[0].logprobs[0]
    assert first.chosen.token_id == deltas[0].token_ids[0]
    assert [p.logprob for p in first.top] == [-1.0, -2.0]


async def test_a_stop_string_is_named(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    full = world.text_of(world.tokens_of("The choir", 60, seed=5))
    stop = full[15:18]
    answer = await events(stub, request(sampling=pb.Sampling(max_tokens=100, seed=5), stop=[stop]))
    assert "".join(event.delta.text for event in answer) == full[: full.index(stop)]
    assert answer[-2].delta.finish_reason == pb.FINISH_REASON_STOP
    assert answer[-2].delta.stop_string == stop


async def test_a_stop_token_of_the_clients_is_named_and_gives_no_text(
    world: fake.World, stub: inference_pb2_grpc.InferenceStub
) -> None:
    tokens = world.tokens_of("The choir", 20, seed=5)
    sampling = pb.Sampling(max_tokens=100, seed=5, stop_token_ids=[tokens[7]])
    end = tokens.index(tokens[7])
    answer = await events(stub, request(sampling=sampling))
    assert answer[-2].delta.stop_token_id == tokens[7]
    assert "".join(event.delta.text for event in answer) == world.text_of(tokens[:end])
    kept = await events(stub, request(sampling=sampling, include_stop=True))
    assert "".join(event.delta.text for event in kept) == world.text_of(tokens[: end + 1])


async def test_a_client_resumes_with_what_it_has(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    for num_seen in range(20):
        whole = [event.delta for event in await events(stub, request()) if event.HasField("delta")]
        num_seen = min(num_seen, len(whole) - 1)  # who has the end of an answer has nothing to go on with
        seen, missing = whole[:num_seen], whole[num_seen:]
        resume = pb.Resume(index=0, token_ids=[token for delta in seen for token in delta.token_ids])
        rest = [event.delta for event in await events(stub, request(resume=[resume])) if event.HasField("delta")]
        # Cut otherwise, it may be: an event holds what there was to send.
        assert "".join(delta.text for delta in rest) == "".join(delta.text for delta in missing)
        assert [token for delta in rest for token in delta.token_ids] == [token for delta in missing for token in delta.token_ids]


async def test_resuming_without_the_seed_is_refused(stub: inference_pb2_grpc.InferenceStub) -> None:
    error = await error_of(stub, request(sampling=pb.Sampling(), resume=[pb.Resume(index=0, token_ids=[5])]))
    assert isinstance(error, InvalidInput)
    assert error.field == "sampling.seed"


async def test_cancelling_the_call_frees_the_engine(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    world.engine.stop_after_tokens = 3
    call = stub.Generate(request())
    await call.read()
    assert world.engine.num_live == 1
    call.cancel()
    await fake.until(lambda: world.engine.num_live == 0)


async def test_the_calls_deadline_reaches_the_engine(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    world.engine.stop_after_tokens = 3
    error = await error_of(stub, request(), timeout_s=0.4)
    assert isinstance(error, DeadlineExceeded)
    seen = world.engine.requests[-1]
    assert seen.deadline_s is not None
    assert seen.deadline_s - seen.arrival_s <= 0.4
    await fake.until(lambda: world.engine.num_live == 0)


async def test_a_call_may_do_without_speculation(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    for speculation in ("off", "auto", ""):
        [response async for response in stub.Generate(request(sampling=pb.Sampling(speculation=speculation)))]
    assert [seen.sampling.speculates for seen in world.engine.requests] == [False, True, True]


async def test_a_call_without_deadline_gets_the_gateways(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    [response async for response in stub.Generate(request())]
    seen = world.engine.requests[-1]
    assert seen.deadline_s is not None
    assert 500 < seen.deadline_s - seen.arrival_s <= 600


BAD: dict[str, tuple[pb.GenerateRequest, type[AntiphonError], str | None]] = {
    "no model": (request(model=""), InvalidInput, "model"),
    "unknown model": (request(model="nobody"), UnknownModel, "model"),
    "no input": (pb.GenerateRequest(model="tiny"), InvalidInput, "prompt"),
    "empty prompt": (request(prompt=""), InvalidInput, "prompt"),
    "empty tokens": (request(tokens=pb.TokenIds()), InvalidInput, "tokens.ids"),
    "tokens outside the vocabulary": (request(tokens=pb.TokenIds(ids=[2**31])), InvalidInput, "tokens.ids"),
    "empty chat": (request(chat=pb.Chat()), InvalidInput, "chat.messages"),
    "unknown role": (
        request(chat=pb.Chat(messages=[pb.ChatMessage(role="king", content="x")])),
        InvalidInput,
        "chat.messages[0].role",
    ),
    "too long": (request(prompt="a b c " * 1000), ContextLengthExceeded, "prompt"),
    "too much output": (request(sampling=pb.Sampling(max_tokens=1000)), ContextLengthExceeded, "sampling.max_tokens"),
    "huge output": (request(sampling=pb.Sampling(max_tokens=2**32 - 1)), InvalidInput, "sampling.max_tokens"),
    "no output": (request(sampling=pb.Sampling(max_tokens=0)), InvalidInput, "sampling.max_tokens"),
    "NaN": (request(sampling=pb.Sampling(temperature=float("nan"))), InvalidInput, "sampling.temperature"),
    "infinity": (request(sampling=pb.Sampling(top_p=float("inf"))), InvalidInput, "sampling.top_p"),
    "negative penalty": (request(sampling=pb.Sampling(repetition_penalty=-1)), InvalidInput, "sampling.repetition_penalty"),
    "wild bias": (request(sampling=pb.Sampling(logit_bias={1: 1000})), InvalidInput, "sampling.logit_bias[1]"),
    "min above max": (request(sampling=pb.Sampling(max_tokens=1, min_tokens=2)), InvalidInput, "sampling.min_tokens"),
    "speculation in another word": (request(sampling=pb.Sampling(speculation="no")), InvalidInput, "sampling.speculation"),
    "10,000 stops": (request(stop=["x"] * 10_000), InvalidInput, "stop"),
    "empty stop": (request(stop=[""]), InvalidInput, "stop[0]"),
    "many choices": (request(num_choices=10_000), InvalidInput, "num_choices"),
    "many logprobs": (request(num_logprobs=21), InvalidInput, "num_logprobs"),
    "odd request id": (request(request_id="a/b"), InvalidInput, "request_id"),
    "resume of no choice": (request(resume=[pb.Resume(index=1)]), InvalidInput, "resume[0].index"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_refused_by_name(stub: inference_pb2_grpc.InferenceStub, name: str) -> None:
    message, kind, field = BAD[name]
    error = await error_of(stub, message)
    assert type(error) is kind
    assert isinstance(error, InvalidInput)
    assert error.field == field


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x0a\x02\xc3\x28"])
async def test_bytes_that_are_no_message_are_bad_input(
    channel: grpc.aio.Channel, stub: inference_pb2_grpc.InferenceStub, raw: bytes
) -> None:
    call = channel.unary_stream("/antiphon.rpc.v1.Inference/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        [response async for response in call(raw)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await events(stub, request())


async def test_overload_is_resource_exhausted_with_retry_after(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, max_num_seqs=1, max_queued=0) as world,
        open_channel(world.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        world.engine.stop_after_tokens = 1
        first = stub.Generate(request())
        await first.read()
        error = await error_of(stub, request())
        assert isinstance(error, Overloaded)
        assert error.retry_after_s >= 1
        first.cancel()


async def test_without_a_worker_it_is_unavailable(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    await world.workers[0].register(ready=False)
    async with asyncio.timeout(10):
        while (await stub.ListModels(pb.ListModelsRequest())).models[0].ready:
            await asyncio.sleep(0.01)
    assert isinstance(await error_of(stub, request()), Unavailable)


async def test_models_are_listed(stub: inference_pb2_grpc.InferenceStub) -> None:
    (card,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (card.id, card.max_model_len, card.ready, card.revision) == ("tiny", fake.MAX_MODEL_LEN, True, "r1")


async def test_status_shows_pools_and_workers(world: fake.World, stub: inference_pb2_grpc.InferenceStub) -> None:
    await events(stub, request())
    status = await stub.GetStatus(pb.GetStatusRequest())
    assert [(pool.name, pool.num_workers, pool.num_ready) for pool in status.pools] == [("monolith", 1, 1)]
    (worker,) = status.workers
    assert worker.worker_id == world.workers[0].info.worker_id
    assert worker.connected
    assert 0 < worker.lease_remaining_s <= fake.LEASE_S
    assert worker.load.num_total_blocks == 100
    assert not (await stub.GetStatus(pb.GetStatusRequest(deployment="other"))).workers


async def test_keys_are_asked_for_where_they_are_configured(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, gateway={"api_keys": frozenset({"secret"})}) as world,
        open_channel(world.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert isinstance(await error_of(stub, request()), Unauthenticated)
        metadata = (("authorization", "Bearer secret"),)
        assert [response async for response in stub.Generate(request(), metadata=metadata)]


async def test_a_users_key_asks_models_and_an_admins_sees_workers_too(tmp_path: Path) -> None:
    lines = [key_line("a", "user", "a-users-key-of-random"), key_line("ops", "admin", "an-admins-key-of-random")]
    (tmp_path / "keys").write_text("\n".join(map(str, lines)))
    async with (
        fake.world(tmp_path, gateway={"api_keys_file": tmp_path / "keys", "metrics_access": "admin"}) as world,
        open_channel(world.grpc_address) as channel,
        httpx.AsyncClient(base_url=world.url) as http,
    ):
        user = (("authorization", "Bearer a-users-key-of-random"),)
        admin = (("authorization", "Bearer an-admins-key-of-random"),)
        stub, experts = inference_pb2_grpc.InferenceStub(channel), experts_pb2_grpc.ExpertsStub(channel)
        assert [response async for response in stub.Generate(request(), metadata=user)]
        assert (await stub.ListModels(pb.ListModelsRequest(), metadata=user)).models
        for call in (
            stub.GetStatus(pb.GetStatusRequest(), metadata=user),
            experts.GetExpertLoad(experts_pb2.GetExpertLoadRequest(), metadata=user),
            experts.Rebalance(experts_pb2.RebalanceRequest(), metadata=user),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await stub.GetStatus(pb.GetStatusRequest(), metadata=admin)).workers
        for path, status in (("/v1/models", 200), ("/status", 403), ("/experts", 403), ("/metrics", 403)):
            answer = await http.get(path, headers=dict(user))
            assert answer.status_code == status, path
            if status == 403:
                assert answer.json()["error"]["code"] == "permission_denied"
                assert (await http.get(path)).status_code == 401
        for path in ("/status", "/metrics"):
            assert (await http.get(path, headers=dict(admin))).status_code == 200


async def test_health_and_reflection_are_served(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "antiphon.rpc.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    assert "antiphon.rpc.v1.Inference" in [service.name for service in answer.list_services_response.service]


async def test_a_lost_worker_costs_no_token(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, workers=("0", "1")) as world,
        open_channel(world.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        for worker in world.workers:
            worker.engine.stop_after_tokens = 5
        call = stub.Generate(request(sampling=pb.Sampling(max_tokens=40, seed=2)))
        reading = aiter(call)
        seen = [await anext(reading)]
        while not seen[-1].delta.token_ids:
            seen.append(await anext(reading))
        busy, other = sorted(world.workers, key=lambda worker: -worker.engine.num_live)
        other.engine.stop_after_tokens = None
        await busy.die()
        seen += [response async for response in reading]
        tokens = [token for event in seen for token in event.delta.token_ids]
        assert tokens == world.tokens_of("The choir", 40, seed=2)
        assert "".join(event.delta.text for event in seen) == world.text_of(tokens)
        assert seen[-1].completed.usage.num_resumptions == 1


async def test_a_gateway_of_kubernetes_is_told_which_replica_to_ask(tmp_path: Path) -> None:
    from antiphon.rpc.v1 import ext_proc_pb2 as picker

    async with (
        fake.world(tmp_path, gateway={"picker_targets": "127.0.0.1:8000"}) as made,
        grpc.aio.insecure_channel(f"127.0.0.1:{made.ports.grpc_port}") as channel,
    ):
        process = channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=picker.ProcessingRequest.SerializeToString,
            response_deserializer=picker.ProcessingResponse.FromString,
        )
        asked = picker.ProcessingRequest(request_headers=picker.HttpHeaders(end_of_stream=True))
        while True:  # the name is resolved once the doors are open
            (answer,) = [answer async for answer in process(iter([asked]), timeout=20)]
            if answer.WhichOneof("response") == "request_headers":
                break
        (option,) = answer.request_headers.response.header_mutation.set_headers
        assert option.header.raw_value == b"127.0.0.1:8000"
