"""How one model is asked with tools and thoughts, and how its answers are read and bound (request speed).

    ChatOptions + messages ─► template's messages and variables        (asking)
    ChatOptions + prompt   ─► AnswerPlan: grammar, thinking, parser    (answering)

A model that can't do what is asked refuses by name. Must not know: doors, workers, or llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.core.request import ThinkingRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import ChatOptions, Tool, ToolCall
from antiphon.gateway.text.events import EventParser, ParserSpec
from antiphon.gateway.text.formats.base import CallFormat
from antiphon.gateway.text.formats.registry import call_format, channel_format, thought_format
from antiphon.gateway.text.tokenizer import TextModel

_TAIL_TOKENS = 64  # of a prompt, in which a thought may stand open


class NotForThisModel(InvalidInput):
    """The model can't do what is asked of it."""

    code = "unsupported_parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFormats:
    """The document's choice; "auto" = what the chat template asks for."""

    tool: str = "auto"
    reasoning: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How an answer is bound and read. ``extra_token_ids`` end the prompt."""

    grammar: str | None = None
    grammar_field: str = ""
    thinking: ThinkingRules | None = None
    parser: ParserSpec | None = None
    call_format: CallFormat | None = None
    tools: tuple[Tool, ...] = ()
    kept: tuple[str, ...] = ()
    extra_token_ids: tuple[int, ...] = ()

    def new_parser(self) -> EventParser | None:
        """A parser for one choice; None = its text is all there is."""
        if self.parser is None:
            return None
        machine = None if self.call_format is None else self.call_format.machine(self.tools)
        spec = self.parser
        return EventParser(replace(spec, calls=machine, custom=frozenset(tool.name for tool in self.tools if tool.is_custom)))


class Dialect:
    """One model's way. Immutable; any thread may use it.

    Args:
        model: the tokenizer.
        formats: the document's choice.

    Raises:
        CheckpointInvalid: there is no such format.
    """

    def __init__(self, model: TextModel, formats: TextFormats) -> None:
        source = model.template_source
        self._model = model
        self.calls = call_format(formats.tool, source)
        self.thoughts = thought_format(formats.reasoning, source)
        self._channels = channel_format(self.calls, self.thoughts)
        self._template_has_tools = source is not None and "tools" in source

    # ---- asking ----------------------------------------------------------------------------------------------------

    def check(self, options: ChatOptions) -> None:
        """Refuse what the model can't do.

        Raises:
            NotForThisModel: the field is named.
        """
        if options.tools and options.tool_choice != "none" and self.calls is None:
            field = options.tools[0].field.partition("[")[0]
            raise NotForThisModel(f"{field}: this model's chat template has none; name one with model.toolFormat", field)
        if self.thoughts is None:
            if options.thinking_budget is not None:
                raise NotForThisModel(f"{options.thinking_field}: this model does not think", options.thinking_field)
            if options.thinking:
                raise NotForThisModel(f"{options.effort_field}: this model does not think", options.effort_field)

    def variables(self, options: ChatOptions, given: Mapping[str, Any]) -> dict[str, Any]:
        """The chat template's variables."""
        found = dict(given)
        if options.tools and options.tool_choice != "none" and self._template_has_tools:
            found["tools"] = [tool.as_openai() for tool in options.tools]
        if options.thinking is not None and self.thoughts is not None:
            found.setdefault("enable_thinking", options.thinking)
            found.setdefault("thinking", options.thinking)
        if options.effort is not None and self.thoughts is not None:
            found.setdefault("reasoning_effort", self.thoughts.efforts.get(options.effort, options.effort))
        return found

    def messages(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[Mapping[str, Any]]:
        """The messages as the template reads them; where it knows no tools, they and their calls are written into the text."""
        if self._template_has_tools or self.calls is None:
            return list(messages) if self._channels is None else one_call_each(messages)
        shown: list[Mapping[str, Any]] = [self._without_calls(message, self.calls) for message in messages]
        if options.tools and options.tool_choice != "none":
            told = described(options.tools, self.calls)
            if shown and shown[0]["role"] in ("system", "developer"):
                shown[0] = {**shown[0], "content": f"{shown[0]['content']}\n\n{told}"}
            else:
                shown.insert(0, {"role": "system", "content": told})
        return shown

    @staticmethod
    def _without_calls(message: Mapping[str, Any], form: CallFormat) -> Mapping[str, Any]:
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if "tool_calls" not in message:
            return message
        calls = [
            ToolCall(id=c["id"], name=c["function"]["name"], arguments=json.dumps(c["function"]["arguments"]))
            for c in message["tool_calls"]
        ]
        content = "\n".join(filter(None, (message["content"], form.write(calls))))
        return {"role": message["role"], "content": content}

    # ---- answering -------------------------------------------------------------------------------------------------

    def plan(self, options: ChatOptions, prompt_ids: Sequence[int], *, is_chat: bool, begun: str = "") -> AnswerPlan:
        """How the answer to a prompt is bound and read; ``begun`` is an answer's beginning, with which the prompt ends.

        Raises:
            InvalidInput: the shape can't be written as a grammar.
        """
        markers = self.thoughts if is_chat else None
        is_open, is_closed = self._thought_at_end(prompt_ids, begun.rstrip()) if markers is not None else (False, False)
        extra: tuple[int, ...] = ()
        if markers is not None and options.thinking is False and not is_closed:
            begun = "" if is_open else f"{markers.start}\n"
            skipped = f"{begun}\n{markers.end}\n\n" if markers.skipped is None else markers.skipped
            extra = self._model.encode(skipped, add_special_tokens=False)
            is_open, is_closed = False, True
        tools = options.callable_tools if is_chat and self.calls is not None else ()
        thoughts = None if is_closed else markers
        reader = (self.calls if tools else None) if self._channels is None or not is_chat else self._channels
        grammar, field = answer_grammar(
            options, tools, reader, thoughts, is_open=is_open, special_tokens=self._model.special_tokens
        )
        thinking = None
        if thoughts is not None and options.thinking_budget is not None:
            thinking = ThinkingRules(
                start=thoughts.start,
                end=thoughts.end,
                end_token_ids=self._model.encode(thoughts.end, add_special_tokens=False),
                budget_tokens=options.thinking_budget,
                is_open=is_open,
            )
        reads = thoughts is not None or reader is not None
        kept = (
            *(() if thoughts is None else (thoughts.start, thoughts.end)),
            *(() if reader is None else reader.markers),
        )
        return AnswerPlan(
            grammar=grammar,
            grammar_field=field,
            thinking=thinking,
            parser=ParserSpec(thoughts=thoughts, is_open=is_open, may_think=thoughts is not None) if reads else None,
            call_format=reader,
            tools=tools,
            kept=kept,
            extra_token_ids=extra,
        )

    def _thought_at_end(self, prompt_ids: Sequence[int], begun: str) -> tuple[bool, bool]:
        """Whether the prompt ends in an open thought, or behind one: just after its end, or within an answer that has begun."""
        assert self.thoughts is not None
        start, end = self.thoughts.start, self.thoughts.end
        tail = self._model.decode(prompt_ids[-_TAIL_TOKENS - len(begun) :], skip_special_tokens=False).rstrip()
        if not begun:
            return tail.endswith(start), tail.endswith(end)
        before = tail.removesuffix(begun).rstrip()
        is_open = begun.rfind(start) > begun.rfind(end) or (before.endswith(start) and end not in begun)
        return is_open, not is_open


def one_call_each(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A history as templates with channels read it: each call is a message with its result behind it; a thought is ``thinking``.

    What was said before a call goes with the thought: there is one place for both.
    """
    results = {m["tool_call_id"]: m for m in messages if m["role"] == "tool" and "tool_call_id" in m}
    shown: list[Mapping[str, Any]] = []
    placed: set[str] = set()
    for message in messages:
        if message["role"] == "tool" and message.get("tool_call_id") in placed:
            continue
        plain = {k: v for k, v in message.items() if k != "reasoning_content"}
        thought = message.get("reasoning_content")
        if "tool_calls" not in message:
            shown.append(plain if thought is None else {**plain, "thinking": thought})
            continue
        said = "\n".join(filter(None, (thought, message["content"])))
        for number, call in enumerate(message["tool_calls"]):
            before = {"thinking": said} if said and number == 0 else {}
            shown.append({**plain, "content": "", **before, "tool_calls": [call]})
            if len(message["tool_calls"]) > 1 and call["id"] in results:
                shown.append(results[call["id"]])
                placed.add(call["id"])
    return shown


def described(tools: Sequence[Tool], form: CallFormat) -> str:
    """Tools in words, for models whose template has no place for them."""
    example = form.write([ToolCall(id="", name="name_of_the_function", arguments='{"argument": "value"}')])
    listed = "\n".join(json.dumps(tool.as_openai()["function"], ensure_ascii=False) for tool in tools)
    return f"You may call these functions:\n<tools>\n{listed}\n</tools>\n\nTo call one, answer exactly like this:\n{example}"
