"""The whole ``/openapi.json`` of the HTTP doors, bodies and answers as types (control speed; made once).

Bodies are described by the models that read them, so the two can't part. Where a door takes more than its model's field (a text
for a list of parts), that is said here. Must not know: how anything is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from antiphon import __version__
from antiphon.gateway.anthropic.schema import CountBody, MessagesBody
from antiphon.gateway.embeddings import answer_bodies as vectors
from antiphon.gateway.embeddings.schema import EmbeddingsBody, RerankBody, ScoreBody
from antiphon.gateway.openai.responses_schema import ResponsesBody
from antiphon.gateway.openai.schema import ChatBody, CompletionBody
from antiphon.gateway.openai.text_routes import DetokenizeBody, TokenizeBody
from antiphon.gateway.web import answer_bodies as answers
from antiphon.gateway.web.traced_step import Traced

Json = dict[str, Any]
Access = Literal["open", "user", "admin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: Literal["get", "post", "delete"]
    path: str
    tag: str
    summary: str
    body: Any = None  # a model; None = the operation takes none
    answer: Any = None  # a model; None = plain text
    event: Any = None  # a model: what a stream is made of, where the body asks for one
    error: Any = answers.ErrorBody
    access: Access = "user"
    query: Mapping[str, str] | None = None  # parameters of the address, with what each is
    example: Json | None = None


_CHAT_EXAMPLE: Final[Json] = {"model": "MODEL", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
_DEPLOYMENT: Final = {"deployment": "Whose; without it the only one, or all."}

OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        tag="OpenAI",
        summary="Answer a conversation",
        body=ChatBody,
        answer=answers.ChatCompletion,
        event=answers.ChatChunk,
        example=_CHAT_EXAMPLE,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        tag="OpenAI",
        summary="Go on with a text",
        body=CompletionBody,
        answer=answers.Completion,
        event=answers.Completion,
        example={"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 32},
    ),
    Operation(
        method="post",
        path="/v1/responses",
        tag="OpenAI",
        summary="Answer, and keep the conversation for an hour",
        body=ResponsesBody,
        answer=answers.AnsweredResponse,
        event=answers.NamedEvent,
        example={"model": "MODEL", "input": "What is the capital of France?"},
    ),
    Operation(
        method="get",
        path="/v1/responses/{response_id}",
        tag="OpenAI",
        summary="A response that was kept",
        answer=answers.AnsweredResponse,
    ),
    Operation(
        method="delete",
        path="/v1/responses/{response_id}",
        tag="OpenAI",
        summary="Forget a response",
        answer=answers.DeletedResponse,
    ),
    Operation(
        method="get",
        path="/v1/responses/{response_id}/input_items",
        tag="OpenAI",
        summary="What a response that was kept answered",
        answer=answers.ItemList,
        query={"order": "desc (the default) or asc.", "limit": "Items at most; 20 by default.", "after": "The one before them."},
    ),
    Operation(
        method="post",
        path="/v1/responses/input_tokens",
        tag="OpenAI",
        summary="Count a request's tokens",
        body=ResponsesBody,
        answer=answers.ResponseInputTokens,
        example={"model": "MODEL", "input": "What is the capital of France?"},
    ),
    Operation(method="get", path="/v1/models", tag="OpenAI", summary="The models served here", answer=answers.ModelList),
    Operation(method="get", path="/v1/models/{name}", tag="OpenAI", summary="One of them", answer=answers.ModelCard),
    Operation(
        method="post",
        path="/v1/messages",
        tag="Anthropic",
        summary="Answer a conversation",
        body=MessagesBody,
        answer=answers.AnsweredMessages,
        event=answers.NamedEvent,
        error=answers.AnthropicErrorBody,
        example={**_CHAT_EXAMPLE, "max_tokens": 64},
    ),
    Operation(
        method="post",
        path="/v1/messages/count_tokens",
        tag="Anthropic",
        summary="Count a conversation's tokens",
        body=CountBody,
        answer=answers.InputTokens,
        error=answers.AnthropicErrorBody,
        example=_CHAT_EXAMPLE,
    ),
    Operation(
        method="post",
        path="/tokenize",
        tag="Text",
        summary="A prompt's tokens",
        body=TokenizeBody,
        answer=answers.Tokens,
        example={"model": "MODEL", "prompt": "Once upon a time", "return_token_strs": True},
    ),
    Operation(
        method="post",
        path="/detokenize",
        tag="Text",
        summary="What tokens say",
        body=DetokenizeBody,
        answer=answers.DetokenizedText,
        example={"model": "MODEL", "tokens": [1, 2, 3]},
    ),
    Operation(
        method="post",
        path="/v1/embeddings",
        tag="Vectors",
        summary="Embed texts or tokens",
        body=EmbeddingsBody,
        answer=vectors.EmbeddingList,
        example={"model": "MODEL", "input": ["The choir answers", "and the other listens"]},
    ),
    Operation(
        method="post",
        path="/v1/rerank",
        tag="Vectors",
        summary="Order documents by how well they answer a query",
        body=RerankBody,
        answer=vectors.Ranking,
        example={"model": "MODEL", "query": "Who listens?", "documents": ["The choir answers", "and the other listens"]},
    ),
    Operation(
        method="post",
        path="/v1/score",
        tag="Vectors",
        summary="Score pairs of texts",
        body=ScoreBody,
        answer=vectors.ScoreList,
        example={"model": "MODEL", "text_1": "Who listens?", "text_2": ["The choir answers"]},
    ),
    Operation(
        method="get", path="/health", tag="Operation", summary="Does the process answer?", answer=answers.Alive, access="open"
    ),
    Operation(
        method="get", path="/ready", tag="Operation", summary="Should it get traffic?", answer=answers.Readiness, access="open"
    ),
    Operation(
        method="get", path="/metrics", tag="Operation", summary="Prometheus' text; endpoint.metricsAccess says who may read it",
        access="open",
    ),
    Operation(
        method="get",
        path="/status",
        tag="Operation",
        summary="Pools, workers, leases and load",
        answer=answers.StatusBody,
        access="admin",
        query=_DEPLOYMENT,
    ),
    Operation(
        method="get",
        path="/usage",
        tag="Operation",
        summary="What tenants used of each model, by day; JSON, or CSV with format=csv",
        access="admin",
        query={"from": "First day, like 2027-01-01 (UTC); today without it.", "to": "Last day.", "format": "json or csv."},
    ),
    Operation(
        method="get",
        path="/experts",
        tag="Operation",
        summary="Rows by layer and expert",
        answer=answers.ExpertRows,
        access="admin",
        query=_DEPLOYMENT,
    ),
    Operation(
        method="post",
        path="/trace",
        tag="Operation",
        summary="Record what the workers do for a moment, and show one step of it",
        answer=Traced,
        access="admin",
        query={**_DEPLOYMENT, "seconds": "For how long, 0.05 to 4; without it half a second, or until a step has ended."},
    ),
)  # fmt: skip

_HEADERS: Final = {
    "x-request-id": "Taken over, and returned; without it one is made.",
    "x-request-timeout-s": "The request's deadline, in seconds from now.",
    "last-event-id": "Of a stream that broke off: with its x-request-id, the same body gives the events after this one.",
    "traceparent": "The trace that the request belongs to (W3C).",
}
# Schema, field, and what its door takes beside what the model says.
_ALSO_TEXT: Final = (
    ("MessageBody", "content"),
    ("AnthropicMessage", "content"),
    ("AnthropicBlock", "content"),
    ("ChatBody", "stop"),
    ("CompletionBody", "stop"),
)
_LONG: Final = "antiphon__gateway__"  # how pydantic begins the names of models that share one
_REF: Final = "#/components/schemas/"


def openapi(*, unknown_fields: Literal["refuse", "ignore"], with_keys: bool, more: Sequence[Operation] = ()) -> Json:
    """The document; see ``Operation``.

    Args:
        unknown_fields: as the endpoint has it: whether bodies may have fields that no model knows.
        with_keys: whether keys are asked for.
        more: what doors in front of these add.
    """
    operations = (*OPERATIONS, *more)
    schemas, refs = _schemas(operations, allow_more=unknown_fields == "ignore")
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, refs, with_keys=with_keys)
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Antiphon",
            "version": __version__,
            "description": "Large language models with attention and FFN on separate pools, behind OpenAI's and Anthropic's APIs.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _schemas(operations: Sequence[Operation], *, allow_more: bool) -> tuple[Json, dict[int, Json]]:
    """Every type's schema by name, and a reference to each by the type's identity."""
    bodies = [operation.body for operation in operations if operation.body is not None]
    given = [t for o in operations for t in (o.answer, o.event, o.error) if t is not None]
    wanted = [(kind, "validation") for kind in bodies] + [(kind, "serialization") for kind in given]
    inputs = {(kind, mode): TypeAdapter(kind) for kind, mode in wanted}
    refs, made = TypeAdapter.json_schemas(
        [(id(kind), mode, adapter) for (kind, mode), adapter in inputs.items()],  # type: ignore[misc]
        ref_template=_REF + "{model}",
    )
    schemas: Json = {_short(name): _renamed(schema) for name, schema in made["$defs"].items()}
    for schema in schemas.values():
        if allow_more and schema.get("additionalProperties") is False:
            del schema["additionalProperties"]
    for name, field in _ALSO_TEXT:
        as_parts = schemas[name]["properties"][field]
        schemas[name]["properties"][field] = {"anyOf": [{"type": "string"}, {"type": "null"}, as_parts], "title": as_parts["title"]}
    schemas["MessageBody"]["required"] = ["role"]  # an assistant's message may have calls alone
    for name in ("MessagesBody", "CountBody"):
        system = schemas[name]["properties"]["system"]
        schemas[name]["properties"]["system"] = {"anyOf": [{"type": "string"}, system], "title": "System"}
    return schemas, {kind: _renamed(ref) for (kind, _), ref in refs.items()}


def _renamed(value: Any) -> Any:
    """With references to the names that ``_short`` gives."""
    if isinstance(value, dict):
        return {key: f"{_REF}{_short(each.removeprefix(_REF))}" if key == "$ref" else _renamed(each) for key, each in value.items()}
    return [_renamed(each) for each in value] if isinstance(value, list) else value


def _short(name: str) -> str:
    """Names that two doors have both, as people would tell them apart."""
    if name in ("Block", "Message"):
        return f"Anthropic{name}"
    if not name.startswith(_LONG):
        return name
    return ("Anthropic" if name.startswith(f"{_LONG}anthropic") else "") + name.rpartition("__")[2]


def _operation(operation: Operation, refs: Mapping[int, Json], *, with_keys: bool) -> Json:
    content: Json = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": {"schema": refs[id(operation.answer)]}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": refs[id(operation.event)]}
    made: Json = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "parameters": _parameters(operation),
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": {"description": "An error", "content": {"application/json": {"schema": refs[id(operation.error)]}}},
        },
    }
    if operation.body is not None:
        described: Json = {"schema": refs[id(operation.body)]}
        if operation.example is not None:
            described["example"] = operation.example
        made["requestBody"] = {"required": True, "content": {"application/json": described}}
    if with_keys and operation.access != "open":
        made["security"] = [{"key": []}]
    if operation.access == "admin":
        made["description"] = "For keys of scope admin, where keys are asked for."
    return made


def _parameters(operation: Operation) -> list[Json]:
    text: Json = {"schema": {"type": "string"}}
    path = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    return [
        *({"name": name, "in": "path", "required": True, **text} for name in path),
        *({"name": name, "in": "query", "description": words, **text} for name, words in (operation.query or {}).items()),
        *(
            {"name": name, "in": "header", "description": words, **text}
            for name, words in (_HEADERS.items() if operation.body is not None else ())
        ),
    ]
