"""The public Inference service: what it does about clients that ask and never read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest

from antiphon.rpc.inference import CallInfo, InferencePort, InferenceServicer
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import inference_pb2 as pb
from antiphon.rpc.v1 import inference_pb2_grpc

PIECE = "x" * 20_000


class Talker(InferencePort):
    """Says more than gRPC takes ahead of a reader."""

    def __init__(self, num_pieces: int) -> None:
        self.num_pieces = num_pieces
        self.let_go = asyncio.Event()
        self.num_said = 0

    async def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        try:
            for _ in range(self.num_pieces):
                self.num_said += 1
                yield pb.GenerateResponse(delta=pb.Delta(text=PIECE))
        finally:
            self.let_go.set()

    async def list_models(self, request: Any, call: CallInfo) -> Any:
        raise NotImplementedError

    get_status = embed = score = list_models


async def test_a_client_that_never_reads_holds_its_answer_no_longer_than_it_may() -> None:
    talker = Talker(10_000)
    async with (
        asyncio.timeout(30),
        RpcServer([InferenceServicer(talker, write_timeout_s=0.3)], host="127.0.0.1", public=True) as server,
    ):
        with grpc.insecure_channel(server.address) as channel:  # its own threads read one message ahead, and no more
            call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(model="m"))  # type: ignore[no-untyped-call]
            await talker.let_go.wait()
            assert talker.num_said < talker.num_pieces

            def read() -> grpc.RpcError:
                with pytest.raises(grpc.RpcError) as error:
                    list(call)
                return error.value

            assert (await asyncio.to_thread(read)).code() is grpc.StatusCode.DEADLINE_EXCEEDED  # once it does read


async def test_a_client_that_reads_slowly_gets_all_of_it() -> None:
    talker = Talker(100)
    async with (
        asyncio.timeout(30),
        RpcServer([InferenceServicer(talker, write_timeout_s=5.0)], host="127.0.0.1", public=True) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        texts = []
        async for response in stub.Generate(pb.GenerateRequest(model="m")):
            texts.append(response.delta.text)
            for _ in range(100):  # turns of the loop in which it takes nothing
                await asyncio.sleep(0)
        assert texts == [PIECE] * 100
