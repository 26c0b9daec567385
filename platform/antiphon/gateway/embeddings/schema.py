"""Bodies of /v1/embeddings, /v1/rerank and /v1/score, strictly typed (request speed).

Embeddings are OpenAI's; rerank is Cohere's and Jina's as vLLM has it, score is vLLM's. Must not know: HTTP, tokenizers, workers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from antiphon.core.errors import InvalidInput
from antiphon.gateway.embeddings.request import MAX_INPUTS, TextOrTokens

MAX_TOKEN_ID = 2**31 - 1
_FORMS = "must be a string, a list of strings, a list of token ids or a list of such lists"
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_INPUT_SCHEMA = {
    "title": "Input",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, _TOKENS, {"type": "array", "items": _TOKENS}],
}


def _inputs(value: object) -> tuple[TextOrTokens, ...]:
    """An input in any of its forms, checked by hand: trying one form after the other costs seconds for a long list."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidInput(f"input: {_FORMS}", "input")
    if not value:
        raise InvalidInput("input: an empty list has nothing to embed", "input")
    if type(value[0]) is int:
        return (_ids(value, "input"),)
    if len(value) > MAX_INPUTS:
        raise InvalidInput(f"input: {len(value)} inputs are more than {MAX_INPUTS}", "input")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_ids(item, f"input[{index}]") for index, item in enumerate(value))
    raise InvalidInput(f"input: {_FORMS}", "input")


def _ids(value: list[Any], field: str) -> tuple[int, ...]:
    wrong = next((i for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID), None)
    if wrong is not None:
        raise InvalidInput(f"input: {_FORMS}; {field}[{wrong}] is not a token id", "input")
    return tuple(value)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    user: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=MAX_TOKEN_ID)
    priority: int | None = Field(default=None, ge=-(2**31), le=MAX_TOKEN_ID)


class EmbeddingsBody(_Body):
    """POST /v1/embeddings."""

    input: Annotated[tuple[TextOrTokens, ...], PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    add_special_tokens: bool | None = None


class DocumentBody(BaseModel):
    """A document with a name for its text."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    text: str


class RerankBody(_Body):
    """POST /v1/rerank."""

    query: str
    documents: list[str | DocumentBody] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    return_documents: bool | None = None
    instruction: str | None = None


class ScoreBody(_Body):
    """POST /v1/score: one text against one or many, or as many against as many."""

    text_1: str | list[str]
    text_2: str | list[str]
    instruction: str | None = None

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs.

        Raises:
            InvalidInput: the numbers of texts don't fit together.
        """
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if not first or not 1 <= len(second) <= MAX_INPUTS:
            field = "text_2" if first else "text_1"
            raise InvalidInput(f"{field}: 1 to {MAX_INPUTS} texts are needed", field)
        if len(first) not in (1, len(second)):
            raise InvalidInput(f"text_1: {len(first)} texts for {len(second)} of text_2; expected one, or as many", "text_1")
        return tuple(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
