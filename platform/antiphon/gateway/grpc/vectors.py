"""Embeddings and scores of the public gRPC door: messages to values and back (request speed).

Must not know: how vectors are made.
"""

from __future__ import annotations

import math

from antiphon.core.errors import InvalidInput
from antiphon.gateway.access.keys import cache_salt
from antiphon.gateway.embeddings.request import MAX_INPUTS, EmbeddingRequest, ScoreRequest, TextOrTokens, VectorCall
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.openai.http_io import new_request_id, valid_request_id
from antiphon.rpc.inference import CallInfo
from antiphon.rpc.v1 import inference_pb2 as pb


async def embed(gateway: Gateway, request: pb.EmbedRequest, call: CallInfo) -> pb.EmbedResponse:
    """See the proto. Raises as ``VectorMaker.embed``."""
    made_call = _call(gateway, request, call)
    field = "texts" if request.texts else "tokens"
    inputs: tuple[TextOrTokens, ...] = tuple(request.texts) or tuple(tuple(tokens.ids) for tokens in request.tokens)
    if not inputs or (request.texts and request.tokens):
        raise InvalidInput("either texts or tokens are needed", "texts")
    if len(inputs) > MAX_INPUTS:
        raise InvalidInput(f"{len(inputs)} inputs are more than {MAX_INPUTS}", field)
    dimensions = request.dimensions if request.HasField("dimensions") else None
    if dimensions == 0:
        raise InvalidInput("0 dimensions are none", "dimensions")
    made = await gateway.vectors().embed(EmbeddingRequest(call=made_call, inputs=inputs, dimensions=dimensions, field=field))
    return pb.EmbedResponse(
        request_id=made_call.request_id,
        model=request.model,
        vectors=[pb.Vector(values=vector) for vector in made.vectors],
        num_prompt_tokens=made.num_prompt_tokens,
    )


async def score(gateway: Gateway, request: pb.ScoreRequest, call: CallInfo) -> pb.ScoreResponse:
    """See the proto. Raises as ``VectorMaker.score``."""
    made_call = _call(gateway, request, call)
    if not 1 <= len(request.documents) <= MAX_INPUTS:
        raise InvalidInput(f"1 to {MAX_INPUTS} documents are needed", "documents")
    pairs = tuple((request.query, document) for document in request.documents)
    made = await gateway.vectors().score(ScoreRequest(call=made_call, pairs=pairs, instruction=request.instruction or None))
    return pb.ScoreResponse(
        request_id=made_call.request_id, model=request.model, scores=made.values, num_prompt_tokens=made.num_prompt_tokens
    )


def _call(gateway: Gateway, request: pb.EmbedRequest | pb.ScoreRequest, call: CallInfo) -> VectorCall:
    tenant = gateway.admit(call.metadata.get("authorization"))
    if not request.model:
        raise InvalidInput("model is missing", "model")
    if request.request_id and not valid_request_id(request.request_id):
        raise InvalidInput("a request id has at most 128 characters of A-Z a-z 0-9 . _ : -", "request_id")
    truncate = request.truncate_tokens if request.HasField("truncate_tokens") else None
    if truncate is not None and truncate < -1:
        raise InvalidInput("expected -1 or more", "truncate_tokens")
    shared = request.model in gateway.config.shared_cache_models
    left_s = call.deadline_left_s
    return VectorCall(
        request_id=request.request_id or new_request_id(),
        model=request.model,
        deadline_s=left_s if left_s is not None and math.isfinite(left_s) else None,
        priority=request.priority,
        cache_salt=request.cache_salt if shared else cache_salt(tenant, request.cache_salt),
        tenant=tenant,
        traceparent=call.metadata.get("traceparent"),
        truncate_tokens=truncate,
    )
