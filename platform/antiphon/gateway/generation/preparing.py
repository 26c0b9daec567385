"""Prompts to token ids with the plan of their answers: what must be known before a worker is asked (request speed).

    messages ─► template's words ─► token ids ─► grammar, found affordable ─► Prepared

Must not know: workers, doors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from antiphon.core.errors import ContextLengthExceeded, InvalidInput
from antiphon.core.request import OutputRules
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.generation.infilling import infilling, infilling_ends
from antiphon.gateway.generation.request import ChatMessage, ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from antiphon.gateway.text.answer_grammar import is_long
from antiphon.gateway.text.chat_options import ChatOptions
from antiphon.gateway.text.dialect import AnswerPlan, Dialect
from antiphon.gateway.text.templates.template_process import TemplateProcess
from antiphon.gateway.text.tokenizer import INLINE_CHARS, TextModel, in_thread
from antiphon.worker.structure.checking import GrammarChecker

_MAX_TOKENS = 2**20  # of a prompt, while no worker says what its context is
_LONG_CHARS = 2**14  # of a schema; a shorter one takes less than handing it over
_MIN_SHOWN_TOKENS = 2**16  # a text that is only tokenized may have so many at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One prompt, ready to be placed. ``end_ids`` end its answer beside the model's own."""

    token_ids: tuple[int, ...]
    plan: AnswerPlan
    max_tokens: int  # what its choice may generate
    end_ids: frozenset[int] = frozenset()

    @property
    def rules(self) -> OutputRules | None:
        """What its engine is told of the plan."""
        if self.plan.grammar is None and self.plan.thinking is None:
            return None
        return OutputRules(grammar=self.plan.grammar, thinking=self.plan.thinking)


class Preparer:
    """Prepares requests. Belongs to one event loop.

    Args:
        models: tokenizers by the name clients send.
        dialects: the models' ways, by the same names.
        executor: tokenizes long prompts.
        checker: finds out whether grammars are affordable.
        templates: renders chats.
    """

    def __init__(
        self,
        models: Mapping[str, TextModel],
        dialects: Mapping[str, Dialect],
        executor: Executor,
        checker: GrammarChecker,
        templates: TemplateProcess,
    ) -> None:
        self._templates = templates
        self._models = models
        self._dialects = dialects
        self._executor = executor
        self._checker = checker

    async def prepare(self, request: GenerationRequest, max_model_len: int | None) -> list[Prepared]:
        """All prompts of a request.

        Raises:
            InvalidInput: the model can't do what is asked, or something asked for is wrong; the field is named.
            ContextLengthExceeded: the first prompt that is too long; those after it were not looked at.
        """
        dialect = self._dialects[request.model]
        dialect.check(request.options)
        found = []
        for prompt in request.prompts:
            ids = await self._encode(request.model, prompt, request.options, max_model_len or _MAX_TOKENS)
            plan = await self._plan(dialect, request.options, ids, prompt)
            if plan.grammar is not None:
                self._check_sampling(request)
                await self._checker.check(plan.grammar, plan.grammar_field)
            fills = isinstance(prompt, TextPrompt) and prompt.suffix is not None
            ends = infilling_ends(self._models[request.model]) if fills else frozenset()
            ids = (*ids, *plan.extra_token_ids)
            max_tokens = max_tokens_of(request, prompt, ids, max_model_len)  # too long: what follows needs no tokens either
            found.append(Prepared(token_ids=ids, plan=plan, max_tokens=max_tokens, end_ids=ends))
        return found

    async def _plan(self, dialect: Dialect, options: ChatOptions, ids: Sequence[int], prompt: Prompt) -> AnswerPlan:
        """How the answer is bound; a long schema does not hold up other streams."""
        num_chars = INLINE_CHARS + 1 if is_long(options, _LONG_CHARS) else 0
        begun = prompt.messages[-1].content if isinstance(prompt, ChatPrompt) and prompt.continue_final_message else ""
        plan = functools.partial(dialect.plan, options, ids, is_chat=isinstance(prompt, ChatPrompt), begun=begun)
        found: AnswerPlan = await in_thread(self._executor, num_chars, plan)
        return found

    def _check_sampling(self, request: GenerationRequest) -> None:
        """An answer with a shape ends where the shape does."""
        for name, is_set in (("min_tokens", request.sampling.min_tokens > 0), ("ignore_eos", request.sampling.ignore_eos)):
            if is_set:
                field = f"{request.sampling_prefix}{name}"
                raise InvalidInput(f"{field}: an answer that must have a shape ends where the shape does", field)

    async def token_ids(self, model: str, prompt: Prompt, options: ChatOptions, max_model_len: int | None) -> tuple[int, ...]:
        """Token ids of a prompt, as ``prepare`` would have them.

        Raises:
            InvalidInput: the model can't take it.
        """
        dialect = self._dialects[model]
        dialect.check(options)
        ids = await self._encode(model, prompt, options, max_model_len or _MAX_TOKENS)
        return (*ids, *(await self._plan(dialect, options, ids, prompt)).extra_token_ids)

    async def text_ids(
        self, model: str, text: str, max_model_len: int | None, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a text to look at, which may be somewhat longer than a prompt.

        Raises:
            InvalidInput: it is not valid Unicode, or far longer.
        """
        max_tokens = max(_MIN_SHOWN_TOKENS, 4 * (max_model_len or _MAX_TOKENS))
        encode = functools.partial(self._models[model].encode, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        ids: tuple[int, ...] = await in_thread(self._executor, len(text), encode, text)
        return ids

    async def text_of(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones shown."""
        decode = functools.partial(self._models[model].decode, skip_special_tokens=False)
        text: str = await in_thread(self._executor, len(token_ids), decode, token_ids)
        return text

    async def texts_of(self, model: str, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        text_model = self._models[model]

        def each() -> list[str]:
            return [text_model.token_text(token_id).text for token_id in token_ids]

        texts: list[str] = await in_thread(self._executor, len(token_ids), each)
        return texts

    async def _encode(self, model: str, prompt: Prompt, options: ChatOptions, max_tokens: int) -> tuple[int, ...]:
        text_model = self._models[model]
        ids: tuple[int, ...]
        try:
            match prompt:
                case TextPrompt(suffix=str(suffix)):
                    fill = functools.partial(infilling, text_model, prompt.text, suffix, max_tokens=max_tokens)
                    ids = await in_thread(self._executor, len(prompt.text) + len(suffix), fill)
                case TextPrompt():
                    encode = functools.partial(text_model.encode, max_tokens=max_tokens)
                    ids = await in_thread(self._executor, len(prompt.text), encode, prompt.text)
                case ChatPrompt():
                    ids = await self._encode_chat(model, prompt, options, max_tokens)
                case TokenPrompt():
                    ids = prompt.token_ids
        except InvalidInput as error:
            raise type(error)(str(error), prompt.field if error.field in (None, "prompt") else error.field) from error
        if not ids:
            raise InvalidInput("the prompt is empty: it has no tokens", prompt.field)
        return ids

    async def _encode_chat(self, model: str, prompt: ChatPrompt, options: ChatOptions, max_tokens: int) -> tuple[int, ...]:
        text_model, dialect = self._models[model], self._dialects[model]
        if not text_model.takes_chats:
            raise InvalidInput("this model has no chat template; use completions", "messages")
        begun = prompt.messages[-1:] if prompt.continue_final_message else ()
        shown = [template_message(message) for message in prompt.messages[: len(prompt.messages) - len(begun)]]
        given, named = dialect.messages(shown, options), dialect.variables(options, prompt.variables)
        messages, variables, breaker = await in_thread(self._executor, _num_chars(prompt, options), text_model.guard, given, named)
        text = await self._templates.render(
            model, messages, add_generation_prompt=prompt.add_generation_prompt or bool(begun), variables=variables
        )
        ids: tuple[int, ...] = await in_thread(self._executor, len(text), text_model.encode_rendered, text, breaker, max_tokens)
        for message in begun:
            ids += await in_thread(self._executor, len(message.content), text_model.encode_begun, message.content, max_tokens)
        return ids


def _num_chars(prompt: ChatPrompt, options: ChatOptions) -> int:
    """About how much a chat's preparing has to look at; tools are seldom little."""
    said = sum(len(m.content) + len(m.reasoning or "") + sum(len(call.arguments) for call in m.tool_calls) for m in prompt.messages)
    given = sum(len(value) for value in prompt.variables.values() if isinstance(value, str))
    return said + given + (INLINE_CHARS if options.tools else 0)


def template_message(message: ChatMessage) -> dict[str, Any]:
    """As chat templates read it: arguments of calls as values."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        found["name"] = message.name
    if message.reasoning is not None:
        found["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str) -> Any:
    try:
        return read_json_text(text) if text else {}
    except ValueError:
        return text


def prompt_text(text_model: TextModel, prompt: Prompt, ids: Sequence[int]) -> str:
    """A prompt as text, for echo."""
    return prompt.text if isinstance(prompt, TextPrompt) else text_model.decode(ids)


def check_ids(request: GenerationRequest, prompts: Sequence[Sequence[int]], vocab_size: int | None) -> None:
    """Token ids that clients name exist. Raises InvalidInput."""
    if vocab_size is None:
        return
    named: list[tuple[str, Iterable[int]]] = [
        (f"{request.sampling_prefix}logit_bias", request.sampling.logit_bias),
        (f"{request.sampling_prefix}stop_token_ids", request.sampling.stop_token_ids),
    ]
    named += [(p.field, ids) for p, ids in zip(request.prompts, prompts, strict=True) if isinstance(p, TokenPrompt)]
    named += [("resume", ids) for ids in request.resume.values()]
    for field_name, ids in named:
        wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise InvalidInput(f"token id {wrong} is not in the model's vocabulary of {vocab_size}", field_name)


def max_tokens_of(request: GenerationRequest, prompt: Prompt, ids: Sequence[int], max_model_len: int | None) -> int:
    """What the choice may generate: asked for, or the room that the prompt leaves. Raises ContextLengthExceeded."""
    asked = request.sampling.max_tokens
    if max_model_len is None:  # no worker is registered; placing will say so
        return 1 if asked is None else asked
    room = max_model_len - len(ids)
    if room < 1:
        raise ContextLengthExceeded(
            f"the model's context is {max_model_len} tokens, prompt and output together; the prompt has {len(ids)}", prompt.field
        )
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"the model's context is {max_model_len} tokens, prompt and output together; the prompt has {len(ids)} and "
            f"{asked} were asked for: at most {room} fit",
            request.max_tokens_field,
        )
    return room if asked is None else asked
