"""POST /tokenize and /detokenize, as vLLM has them (request speed). Must not know: how requests are answered."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from antiphon.core.errors import InvalidInput
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import ChatPrompt
from antiphon.gateway.generation.sampling_fields import MAX_TOKEN_ID
from antiphon.gateway.openai.bodies.tools import MAX_TOOLS, ToolBody, tools_of
from antiphon.gateway.openai.http_io import error_response
from antiphon.gateway.openai.messages import MessageBody
from antiphon.gateway.openai.parsing import parse_tolerant, warning_header
from antiphon.gateway.openai.schema import MAX_MESSAGES, TemplateVariables, continues
from antiphon.gateway.text.chat_options import ChatOptions

MAX_TOKENS = 262_144
_CHAT_ONLY = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TokenizeBody(BaseModel):
    """POST /tokenize: a prompt, or a chat."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    prompt: str | None = None
    messages: list[MessageBody] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[ToolBody] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raises InvalidInput where fields contradict each other."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("one of prompt and messages is needed", "prompt")
        for name in _CHAT_ONLY if self.messages is None else ():
            if getattr(self, name) is not None:
                raise InvalidInput(f"{name}: it is for messages, not for a prompt", name)
        if self.messages is not None and self.add_special_tokens:
            raise InvalidInput("add_special_tokens: a chat's are those of the model's chat template", "add_special_tokens")

    def chat(self) -> ChatPrompt:
        """The chat. Raises InvalidInput where fields contradict each other."""
        messages = self.messages or []
        begun = continues(messages, self.continue_final_message, self.add_generation_prompt)
        return ChatPrompt(
            messages=tuple(message.message() for message in messages),
            add_generation_prompt=not begun if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=begun,
            variables=self.chat_template_kwargs or {},
        )


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    tokens: list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]] = Field(max_length=MAX_TOKENS)


def add_text_routes(app: FastAPI, gateway: Gateway) -> None:
    """Put the routes into the application."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        raw: dict[str, Any] = {}
        try:
            tenant = gateway.admit(request.headers.get("authorization"))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, TokenizeBody, raw, gateway.config.unknown_fields)
            async with gateway.admission.unasked(tenant):
                ids = await _ids(gateway, body)
                answer: dict[str, Any] = {
                    "count": len(ids),
                    "max_model_len": gateway.max_model_len(body.model),
                    "tokens": list(ids),
                }
                if body.return_token_strs:
                    answer["token_strs"] = await gateway.texts_of(body.model, ids)
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            gateway.refused(error, raw.get("model"))
            return error_response(error)
        return JSONResponse(answer, headers=warning_header(ignored))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        raw: dict[str, Any] = {}
        try:
            tenant = gateway.admit(request.headers.get("authorization"))
            raw = await gateway.bodies.read_json(request, gateway.config.max_request_bytes)
            body, ignored = await gateway.bodies.work(request, parse_tolerant, DetokenizeBody, raw, gateway.config.unknown_fields)
            async with gateway.admission.unasked(tenant):
                text = await gateway.text_of(body.model, body.tokens)
        except Exception as error:  # noqa: BLE001 - the door, as above
            gateway.refused(error, raw.get("model"))
            return error_response(error)
        return JSONResponse({"prompt": text}, headers=warning_header(ignored))


async def _ids(gateway: Gateway, body: TokenizeBody) -> tuple[int, ...]:
    body.check()
    if body.prompt is not None:
        return await gateway.text_ids(body.model, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    tools = tools_of(body.tools or [])
    return await gateway.prompt_ids(body.model, body.chat(), ChatOptions(tools=tools, tool_choice="auto" if tools else "none"))
