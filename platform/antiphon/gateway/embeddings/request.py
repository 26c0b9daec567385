"""What is asked of a model that answers with vectors, and what it gives (values; request speed).

    EmbeddingRequest, ScoreRequest ──► VectorMaker ──► Embeddings, Scores

Must not know: HTTP, grpc, or workers.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_INPUTS = 2048  # OpenAI's

TextOrTokens = str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorCall:
    """What both kinds of request carry."""

    request_id: str
    model: str
    deadline_s: float | None = None  # from arrival; None = the gateway's default
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""  # whose key it came with; "" where no keys are asked for
    traceparent: str | None = None
    truncate_tokens: int | None = (
        None  # texts are cut to so many tokens; -1 = to the model's longest, None = longer ones are refused
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """Vectors of texts or token ids."""

    call: VectorCall
    inputs: tuple[TextOrTokens, ...]
    dimensions: int | None = None  # None = all
    add_special_tokens: bool = True  # of texts
    field: str = "input"  # what they are called in errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """How well each second text answers its first. ``fields`` name the two in errors."""

    call: VectorCall
    pairs: tuple[tuple[str, str], ...]
    instruction: str | None = None  # what "answers" means, to models that are told; None = the models' own words
    fields: tuple[str, str] = ("query", "documents")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors in the order of the inputs."""

    vectors: tuple[tuple[float, ...], ...]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores in the order of the pairs: 0 to 1 of models that rank, -1 to 1 (cosines) of models that embed."""

    values: tuple[float, ...]
    num_prompt_tokens: int
