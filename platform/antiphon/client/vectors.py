"""Embeddings and scores to and from the SDK's values (request speed). Must not know: connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from antiphon.client.values import Embeddings, Scores
from antiphon.core.errors import InvalidInput
from antiphon.rpc.v1 import inference_pb2 as pb


class _Options(TypedDict, total=False):
    truncate_tokens: int  # [longer texts are refused] texts are cut to so many tokens; -1 = to the model's longest
    request_id: str  # [chosen by the server]
    priority: int  # [0] smaller runs earlier
    cache_salt: str  # separates prefix caches
    timeout_s: float  # [the client's] for the whole call with its retries


class EmbedOptions(_Options, total=False):
    """What may be asked of a model that embeds. Exactly one of ``texts`` and ``token_ids`` is needed."""

    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    dimensions: int  # [all] where the model's embeddings may be cut


class ScoreOptions(_Options, total=False):
    """What may be asked of a model that ranks."""

    instruction: str  # [the model's own words] what to judge by


def embed_request(model: str, options: EmbedOptions) -> tuple[pb.EmbedRequest, float | None]:
    """The message, and the call's timeout. Raises InvalidInput."""
    if ("texts" in options) == ("token_ids" in options):
        raise InvalidInput("exactly one of texts and token_ids is needed", "texts")
    texts = options.get("texts", ())
    if isinstance(texts, str):
        raise InvalidInput("texts: expected a sequence, got text", "texts")
    fields: dict[str, Any] = {"model": model, "texts": texts}
    try:
        fields["tokens"] = [pb.TokenIds(ids=ids) for ids in options.get("token_ids", ())]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"token_ids: {error}", "token_ids") from error
    return _made(pb.EmbedRequest, fields, options, EmbedOptions, ("texts", "token_ids"))


def score_request(model: str, query: str, documents: Sequence[str], options: ScoreOptions) -> tuple[pb.ScoreRequest, float | None]:
    """The message, and the call's timeout. Raises InvalidInput."""
    if isinstance(documents, str):
        raise InvalidInput("documents: expected a sequence, got text", "documents")
    return _made(pb.ScoreRequest, {"model": model, "query": query, "documents": documents}, options, ScoreOptions, ())


def _made(
    kind: Any, fields: dict[str, Any], options: Mapping[str, Any], known: Any, taken: Sequence[str]
) -> tuple[Any, float | None]:
    unknown = options.keys() - known.__annotations__.keys() - _Options.__annotations__.keys()
    if unknown:
        raise InvalidInput(f"unknown options: {', '.join(sorted(unknown))}", min(unknown))
    fields |= {name: value for name, value in options.items() if name != "timeout_s" and name not in taken}
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{name}: {error}", name) from error
    return kind(**fields), options.get("timeout_s")


def embeddings_of(response: pb.EmbedResponse) -> Embeddings:
    """The vectors as values."""
    vectors = tuple(tuple(vector.values) for vector in response.vectors)
    return Embeddings(vectors=vectors, num_prompt_tokens=response.num_prompt_tokens)


def scores_of(response: pb.ScoreResponse) -> Scores:
    """The scores as values."""
    return Scores(values=tuple(response.scores), num_prompt_tokens=response.num_prompt_tokens)
