"""What a model's answer looks like to an application: chunks while it comes, a completion when it is whole (values).

Must not know: messages on the wire, or connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that an answer may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema of its arguments
    strict: bool = False  # its arguments are always valid by the schema


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function. ``id`` ties a tool's message to it; the application may choose another."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """What a chunk adds to a call: its name with the first piece; ``is_whole`` with the last."""

    index: int  # counts the answer's calls
    name: str = ""
    arguments: str = ""
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str  # system, developer, user, assistant or tool
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str = ""  # of a tool: whose result it is
    reasoning: str = ""  # what an assistant thought


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenProbability:
    """A token and its log-probability."""

    token_id: int
    token: str  # with replacement characters where the token is part of a character
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One output position: the chosen token, and the most probable ones."""

    chosen: TokenProbability
    rank: int  # 0 = most probable
    top: tuple[TokenProbability, ...] = ()  # most probable first


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What came for one choice since its last chunk."""

    index: int  # which choice
    text: str = ""  # whole characters only; may be empty while tokens come
    thought: str = ""  # of a model whose thoughts are read
    calls: tuple[CallPiece, ...] = ()  # of a model whose calls are read
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()  # one per token when asked for
    finish_reason: FinishReason | None = None  # STOP or LENGTH, on a choice's last chunk
    stop_string: str | None = None  # the one that ended it, when one did
    stop_token_id: int | None = None  # the one that ended it, when one did


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # those that are whole
    finish_reason: FinishReason | None = None  # None = the stream was closed before its end
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens and times of a request."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int  # prompt tokens found in a prefix cache
    num_remote_tokens: int  # prompt tokens whose KV came from a prefill worker
    num_resumptions: int  # times a worker was lost and another took over
    first_token_s: float  # from arrival at the gateway
    finished_s: float  # the same
    num_thought_tokens: int = 0  # of the completion's


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All answers to one request."""

    request_id: str
    model: str
    created: int  # seconds since 1970
    seed: int  # of choice 0, drawn or given
    choices: tuple[Choice, ...]
    usage: Usage | None  # None = the stream was closed before its end

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's calls."""
        return self.choices[0].tool_calls if self.choices else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors in the order of the inputs."""

    vectors: tuple[tuple[float, ...], ...]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores in the order of the documents: 0 to 1 of models that rank, -1 to 1 of models that embed."""

    values: tuple[float, ...]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that is served."""

    id: str
    max_model_len: int  # tokens, prompt plus output
    created: int  # seconds since 1970
    ready: bool  # at least one worker takes requests now
    revision: str
    task: str = ""  # generate, embed or rerank; "" = the server does not say
