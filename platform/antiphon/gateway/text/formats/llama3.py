"""Llama 3.x: the answer is {"name": ..., "parameters": {...}}, several apart by "; ", after <|python_tag|> (request speed)."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import CallMachine, Malformed, Rules, Steps, one_or_more
from antiphon.gateway.text.formats.json_calls import JsonCallMachine, any_of, call_object, written

_TAG = "<|python_tag|>"


class Llama3Format:
    """See the module."""

    name = "llama3_json"
    markers = (_TAG,)
    opening: str | None = None

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _TAG in template or ('"parameters": dictionary of argument name' in template)

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``."""
        return _Machine(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        return "; ".join(written(call, key="parameters") for call in calls)

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        call = any_of([call_object(tool, rules, key="parameters") for tool in tools])
        return one_or_more(rules.name(call), rules.literal("; "), parallel=parallel)


class _Machine(JsonCallMachine):
    def accepts(self, name: str) -> bool:
        return name in self.tools  # an answer may be JSON without being a call

    def run(self) -> Steps[None]:
        while True:
            self.opened("")
            begun = yield from self._beginning()
            if begun != "{":
                self.not_a_call()
                break
            self.put_back(begun)
            try:
                yield from self.json_call()
            except Malformed:
                if not self.is_in_call:
                    self.not_a_call()
                    break
                yield from self.broken()
            char = yield from self.skip_space()
            if char not in ";,":  # nothing may be between calls, either
                self.put_back(char)
        yield from self.until((), self.text)

    def _beginning(self) -> Steps[str]:
        """A brace, or what else the answer begins with; without the tag before it."""
        begun = yield from self.skip_space()
        while _TAG.startswith(begun):
            if begun == _TAG:
                return (yield from self.skip_space())
            begun += yield from self.next_char()
        return begun
