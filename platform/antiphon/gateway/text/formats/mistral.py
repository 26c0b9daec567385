"""Mistral: [TOOL_CALLS] before a list of {"name": ..., "arguments": {...}}, or each call as name[ARGS]{...} (request speed)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import CallMachine, Malformed, Rules, Steps, example_arguments, one_or_more
from antiphon.gateway.text.formats.json_calls import JsonCallMachine, any_of, call_object, written

_OPEN, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralFormat:
    """The list, of models before tokenizer version 11."""

    name = "mistral"
    markers = (_OPEN, _ARGS, _ID)
    opening: str | None = _OPEN

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _OPEN in template and _ARGS not in template

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``; one machine reads both."""
        return _Machine(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        return f"{_OPEN}[{', '.join(written(call) for call in calls)}]"

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        call = rules.name(any_of([call_object(tool, rules) for tool in tools]))
        calls = one_or_more(call, rules.literal(", "), parallel=parallel)
        return f"{rules.literal('[')} {calls} {rules.literal(']')}"


class MistralArgsFormat(MistralFormat):
    """Call by call, of tokenizer version 11 and later."""

    name = "mistral_args"

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _OPEN in template and _ARGS in template

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        return "".join(f"{_OPEN}{call.name}{_ARGS}{json.dumps(example_arguments(call), ensure_ascii=False)}" for call in calls)

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        each = [f"{rules.literal(tool.name + _ARGS)} {rules.arguments(tool)}" for tool in tools]
        return one_or_more(rules.name(any_of(each)), rules.literal(_OPEN), parallel=parallel)


class _Machine(JsonCallMachine):
    def run(self) -> Steps[None]:
        while True:
            self.opened((yield from self.until((_OPEN,), self.text)))
            try:
                first = yield from self.skip_space()
                self.put_back(first)
                if first == "{":
                    yield from self.json_call()
                else:
                    yield from self._list() if first == "[" else self._named()
            except Malformed:
                if self.is_in_call:
                    yield from self.broken()
                else:
                    self.not_a_call()

    def _list(self) -> Steps[None]:
        yield from self.expect("[")
        while True:
            char = yield from self.skip_space()
            if char == "]":
                self.was_empty()
                return
            if char == ",":
                continue
            self.put_back(char)
            if self.is_after_call:
                self.opened("")
            try:
                yield from self.json_call()
            except Malformed:
                if not self.is_in_call:
                    raise
                yield from self.broken()

    def _named(self) -> Steps[None]:
        name = ""
        while True:
            char = yield from self.next_char()
            if char in "[{":
                break
            name += char
        if not name.strip():
            raise Malformed
        while char == "[":
            tag = char
            while char != "]":
                char = yield from self.next_char()
                tag += char
            if tag == _ARGS:
                char = yield from self.skip_space()
                break
            while char != "[":  # a call's id: the client gets one of ours
                char = yield from self.next_char()
        if char != "{":
            raise Malformed
        self.begin(name.strip())
        yield from self.json_value(char, self.arguments)
        self.end()
