"""The SDK: typed blocking and asyncio clients of antiphon.rpc.v1 (request speed).

    from antiphon.client import Client

    with Client("127.0.0.1:9000") as client:
        print(client.generate("smollm2", prompt="The capital of France is", max_tokens=8, temperature=0).text)

Must not know: servers.
"""

from antiphon.client.asynchronous import AsyncClient, AsyncStream
from antiphon.client.blocking import Client, Stream
from antiphon.client.retry import RetryPolicy
from antiphon.client.status_values import CompositionStatus, ExpertStanding, GatewayStatus, PoolStatus, ServiceStatus, WorkerStatus
from antiphon.client.values import (
    CallPiece,
    Choice,
    Chunk,
    Completion,
    Embeddings,
    Logprob,
    Message,
    ModelInfo,
    Scores,
    TokenProbability,
    Tool,
    ToolCall,
    Usage,
)
from antiphon.client.vectors import EmbedOptions, ScoreOptions
from antiphon.client.wire import GenerateOptions
from antiphon.core.request import FinishReason
from antiphon.rpc.client_channel import Tls

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "CallPiece",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "CompositionStatus",
    "EmbedOptions",
    "Embeddings",
    "ExpertStanding",
    "FinishReason",
    "GatewayStatus",
    "GenerateOptions",
    "Logprob",
    "Message",
    "ModelInfo",
    "PoolStatus",
    "RetryPolicy",
    "ScoreOptions",
    "Scores",
    "ServiceStatus",
    "Stream",
    "Tls",
    "TokenProbability",
    "Tool",
    "ToolCall",
    "Usage",
    "WorkerStatus",
]
