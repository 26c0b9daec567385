"""Answers in OpenAI's shapes (request speed). Must not know: HTTP, or where the events come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from antiphon.core.errors import AntiphonError, InternalError, InvalidInput
from antiphon.core.request import FinishReason
from antiphon.gateway.generation.request import ChoiceDelta, Logprob, Started, TokenProbability, Usage
from antiphon.gateway.text.folded import Folded, call_id
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought

Json = dict[str, Any]

_WIDENED: Final = 4  # times as many bytes of a prompt's text may stand for what its tokens say


def error_body(error: AntiphonError) -> Json:
    """{"error": {...}} for any error of the tree."""
    status = error.http_status
    if status == 401:
        kind = "authentication_error"
    elif status == 403:
        kind = "permission_error"
    elif status == 429:
        kind = "rate_limit_error"
    elif status < 500:
        kind = "invalid_request_error"
    elif status == 504:
        kind = "timeout_error"
    else:
        kind = "server_error"
    message = "internal error" if isinstance(error, InternalError) else str(error)
    param = error.field if isinstance(error, InvalidInput) else None
    return {
        "error": {
            "message": _printable(message),
            "type": kind,
            "param": None if param is None else _printable(param),
            "code": error.code,
        }
    }


def _printable(text: str) -> str:
    """What clients sent may come back in a message, also what has no UTF-8 form."""
    return text.encode(errors="backslashreplace").decode()


def model_card(name: str, *, created: int, max_model_len: int | None, task: str = "generate") -> Json:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "antiphon",
        "max_model_len": max_model_len,
        "task": task,
    }


def usage_body(usage: Usage) -> Json:
    """The usage object."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_thought_tokens},
    }


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    folded: Folded = field(default_factory=Folded)
    prompt_logprobs: tuple[Logprob, ...] = ()


class Answer:
    """One request's answer, streamed or whole.

    Args:
        chat: chat.completion shapes, otherwise text_completion.
        num_logprobs: so many of the most probable beside each token's; None = no log-probabilities.
        include_usage: whether a stream ends with the usage.
        echo: begin each text with its prompt (completions).
        n: choices per prompt.
        with_thoughts: show what the model thought.
        with_functions: whether a call is shown by its older name, ``function_call``.
        num_prompt_logprobs: the same of the prompt's tokens by themselves (vLLM's prompt_logprobs).
    """

    def __init__(
        self,
        *,
        chat: bool,
        num_logprobs: int | None,
        include_usage: bool = False,
        echo: bool = False,
        n: int = 1,
        with_thoughts: bool = True,
        with_functions: bool = False,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        self._with_thoughts = with_thoughts
        self._with_functions = with_functions
        self._num_prompt_logprobs = num_prompt_logprobs
        self._chat = chat
        self._num_logprobs = num_logprobs
        self._include_usage = include_usage
        self._echo = echo
        self._n = n
        self._started: Started | None = None
        self._choices: dict[int, _Choice] = {}

    # ---- whole ---------------------------------------------------------------------------------------------------

    def start(self, started: Started) -> None:
        """The first event."""
        self._started = started

    def add(self, delta: ChoiceDelta) -> None:
        """A delta, for ``body``."""
        choice = self._choices.setdefault(delta.index, _Choice())
        choice.text.append(delta.text)
        choice.logprobs.extend(delta.logprobs)
        choice.offsets.extend(delta.text_offsets)
        for part in _parts(delta):
            choice.folded.add(part)
        if delta.prompt_logprobs:
            choice.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = _stop_reason(delta)

    def body(self, usage: Usage) -> Json:
        """The whole answer."""
        choices = [self._whole_choice(index, choice) for index, choice in sorted(self._choices.items())]
        return {
            **self._head("chat.completion" if self._chat else "text_completion"),
            "choices": choices,
            "usage": usage_body(usage),
        }

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        folded = choice.folded
        reason = self._finish(choice.finish_reason, folded, choice.stop_reason)
        ending: Json = {"finish_reason": reason, "stop_reason": choice.stop_reason}
        if self._num_prompt_logprobs is not None:
            ending["prompt_logprobs"] = [_by_token_id(p, self._num_prompt_logprobs) for p in choice.prompt_logprobs]
        text = self._prompt_text(index) + "".join(choice.text)
        if self._chat:
            message = self._message(index, folded)
            return {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs, choice.offsets), **ending}
        prompt = choice.prompt_logprobs if self._echo and self._num_logprobs is not None else ()
        begin = len(self._prompt_text(index))
        offsets = [*_prompt_offsets(prompt, self._prompt_text(index)), *(begin + offset for offset in choice.offsets)]
        logprobs = self._logprobs([*prompt, *choice.logprobs], [min(offset, len(text)) for offset in offsets])
        return {"index": index, "text": text, "logprobs": logprobs, **ending}

    def _message(self, index: int, folded: Folded) -> Json:
        message: Json = {"role": "assistant", "content": folded.text, "refusal": None}
        if folded.calls:
            message["content"] = folded.text or None
        if folded.calls and self._with_functions:
            message["function_call"] = {"name": folded.calls[0].name, "arguments": folded.calls[0].arguments}
        elif folded.calls:
            message["tool_calls"] = [
                {"id": self._call_id(index, number), **_called(call.name, call.arguments, is_custom=call.is_custom)}
                for number, call in enumerate(folded.calls)
            ]
        if folded.thought and self._with_thoughts:
            message["reasoning_content"] = message["reasoning"] = folded.thought
        return message

    # ---- streamed ------------------------------------------------------------------------------------------------

    def chunks(self, delta: ChoiceDelta) -> list[Json]:
        """What a delta is in a stream: a choice's first has the role (or the echo) before it, silent ones are left out."""
        chunks = []
        if delta.index not in self._choices:
            self._choices[delta.index] = _Choice()
            if self._chat:
                chunks.append(self._chunk({"delta": {"role": "assistant", "content": "", "refusal": None}}, delta.index, None))
            elif self._echo and self._num_logprobs is None:
                chunks.append(self._chunk({"text": self._prompt_text(delta.index)}, delta.index, None))
        if delta.prompt_logprobs and self._echo:  # they come once, before the first token
            text = self._prompt_text(delta.index)
            offsets = _prompt_offsets(delta.prompt_logprobs, text)
            chunks.append(self._chunk({"text": text}, delta.index, self._logprobs(delta.prompt_logprobs, offsets)))
        choice = self._choices[delta.index]
        shown: list[Json] = []
        if self._chat:
            for part in _parts(delta):
                choice.folded.add(part)
                shown += self._part_deltas(part, delta.index)
        elif delta.text:
            shown.append({"text": delta.text})
        if not shown and delta.logprobs:
            shown.append({"delta": {"content": ""}} if self._chat else {"text": ""})
        for number, content in enumerate(shown):
            offsets = [len(self._prompt_text(delta.index)) + offset for offset in delta.text_offsets]
            logprobs = self._logprobs(delta.logprobs, offsets) if number == 0 else self._logprobs((), ())
            chunks.append(self._chunk(content, delta.index, logprobs))
        if delta.finish_reason is not None:
            last = self._chunk({"delta": {}} if self._chat else {"text": ""}, delta.index, None)
            reason = self._finish(delta.finish_reason, choice.folded, _stop_reason(delta))
            last["choices"][0].update(finish_reason=reason, stop_reason=_stop_reason(delta))
            chunks.append(last)
        return chunks

    def _part_deltas(self, part: Part, index: int) -> list[Json]:
        match part:
            case Text():
                return [{"delta": {"content": part.gap + part.text}}]
            case Thought():
                thought = {"reasoning_content": part.text, "reasoning": part.text}
                return [{"delta": thought}] if self._with_thoughts else []
            case CallBegin() if self._with_functions:
                return [{"delta": {"function_call": {"name": part.name, "arguments": ""}}}]
            case CallArguments() if self._with_functions:
                return [{"delta": {"function_call": {"arguments": part.text}}}]
            case CallBegin():
                begun = {"index": part.index, "id": self._call_id(index, part.index)}
                return [{"delta": {"tool_calls": [{**begun, **_called(part.name, "", is_custom=part.is_custom)}]}}]
            case CallArguments():
                is_custom = self._choices[index].folded.calls[part.index].is_custom
                grown = {"custom": {"input": part.text}} if is_custom else {"function": {"arguments": part.text}}
                return [{"delta": {"tool_calls": [{"index": part.index, **grown}]}}]
            case CallEnd():
                return []

    def usage_chunk(self, usage: Usage) -> Json | None:
        """The stream's last chunk, when it was asked for."""
        if not self._include_usage:
            return None
        return {
            **self._head("chat.completion.chunk" if self._chat else "text_completion"),
            "choices": [],
            "usage": usage_body(usage),
        }

    def _chunk(self, content: Json, index: int, logprobs: Json | None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": None}
        body = {**self._head(self._chunk_kind), "choices": [choice]}
        if self._include_usage:
            body["usage"] = None
        return body

    # ---- both ----------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> Json:
        assert self._started is not None, "start() comes first"
        started = self._started
        return {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{started.request_id}",
            "object": kind,
            "created": started.created,
            "model": started.model,
            "system_fingerprint": None,
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _call_id(self, index: int, number: int) -> str:
        assert self._started is not None, "start() comes first"
        return call_id(self._started.request_id, index, number)

    def _finish(self, reason: FinishReason | None, folded: Folded, stop: str | int | None) -> str | None:
        if reason is None or not folded.ends_in_calls(reason, stop):
            return None if reason is None else reason.value
        return "function_call" if self._with_functions else "tool_calls"

    def _prompt_text(self, index: int) -> str:
        if not self._echo or self._started is None:
            return ""
        return self._started.prompt_texts[index // self._n]

    def _logprobs(self, logprobs: Sequence[Logprob], offsets: Sequence[int]) -> Json | None:
        num = self._num_logprobs
        if num is None:
            return None
        if self._chat:
            return {"content": [_chat_logprob(logprob) for logprob in logprobs], "refusal": None}
        return {
            "tokens": [_token_name(logprob.chosen) for logprob in logprobs],
            "token_logprobs": [None if logprob.is_first else logprob.chosen.logprob for logprob in logprobs],
            # The sampled token is always among them, as OpenAI promises: up to one more than was asked for.
            "top_logprobs": [
                None if logprob.is_first else {_token_name(p): p.logprob for p in (*logprob.top[:num], logprob.chosen)}
                for logprob in logprobs
            ],
            "text_offset": list(offsets),
        }


def _called(name: str, arguments: str, *, is_custom: bool) -> Json:
    """What was called, with what."""
    if is_custom:
        return {"type": "custom", "custom": {"name": name, "input": arguments}}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _prompt_offsets(prompt: Sequence[Logprob], text: str) -> list[int]:
    """Where a prompt's tokens stand in its text, in characters; a part of a character stands where the character does.

    Tokens are not slices of the text: characters may be split, a first token may stand for no text, or for a space too many.
    """
    raw = text.encode()
    offsets: list[int] = []
    at = seen = num_chars = 0  # bytes that tokens have covered; bytes that are counted, and the characters that begin in them
    unlike = 0  # bytes of tokens since the last one that the text has
    for logprob in prompt:
        token = logprob.chosen.raw
        found = raw.find(token, at, at + len(token) + _WIDENED * unlike)
        begin = at if found < 0 else found
        num_chars += sum(byte & 0xC0 != 0x80 for byte in raw[seen:begin])
        seen = begin
        within = begin < len(raw) and raw[begin] & 0xC0 == 0x80
        offsets.append(num_chars - within)
        unlike = unlike + len(token) if found < 0 else 0
        at = begin if found < 0 else begin + len(token)
    return offsets


def _parts(delta: ChoiceDelta) -> Sequence[Part]:
    """What a delta means; where nothing reads it, its text is all there is."""
    if delta.parts is not None:
        return delta.parts
    return (Text(text=delta.text),) if delta.text else ()


def _by_token_id(logprob: Logprob, num: int) -> Json | None:
    """As vLLM writes the prompt's: by token id, the chosen one among the ``num`` most probable."""
    if logprob.is_first:
        return None
    ranked = [(p, rank + 1) for rank, p in enumerate(logprob.top[:num])]
    if all(p.token_id != logprob.chosen.token_id for p, _ in ranked):
        ranked.append((logprob.chosen, logprob.rank + 1))
    return {str(p.token_id): {"logprob": p.logprob, "rank": rank, "decoded_token": p.text} for p, rank in ranked}


def _stop_reason(delta: ChoiceDelta) -> str | int | None:
    return delta.stop_string if delta.stop_string is not None else delta.stop_token_id


def _chat_logprob(logprob: Logprob) -> Json:
    return {**_chat_token(logprob.chosen), "top_logprobs": [_chat_token(p) for p in logprob.top]}


def _chat_token(probability: TokenProbability) -> Json:
    return {"token": probability.text, "logprob": probability.logprob, "bytes": list(probability.raw)}


def _token_name(probability: TokenProbability) -> str:
    """A token that is no text by itself is named by its bytes, so that two such tokens stay apart."""
    try:
        return probability.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in probability.raw)
