"""What the routes of vectors answer, as published in /openapi.json (values). Must not know: how it is made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PromptUsage(BaseModel):
    """Tokens of a request that ends with its prompt."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(BaseModel):
    """One input's vector; ``embedding`` is base64 of little-endian fp32 where that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """Vectors in the order of the inputs."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: PromptUsage


class RankedText(BaseModel):
    """A document as it was sent."""

    text: str


class RankedDocument(BaseModel):
    """A document's place in the request, and how well it answers."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(BaseModel):
    """Documents, the best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: PromptUsage


class ScoredPair(BaseModel):
    """How well a pair fits."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(BaseModel):
    """Scores in the order of the pairs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoredPair]
    usage: PromptUsage
