"""Hermes and Qwen: <tool_call> {"name": ..., "arguments": {...}} </tool_call>, one pair of markers per call (request speed)."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import SPACE, CallMachine, Malformed, Rules, Steps, one_or_more
from antiphon.gateway.text.formats.json_calls import JsonCallMachine, any_of, call_object, written

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesFormat:
    """See the module."""

    name = "hermes"
    markers = (_OPEN, _CLOSE)
    opening: str | None = _OPEN

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _OPEN in template and "<function=" not in template and "<arg_key>" not in template

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``."""
        return _Machine(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        return "\n".join(f"{_OPEN}\n{written(call)}\n{_CLOSE}" for call in calls)

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        body = any_of([call_object(tool, rules) for tool in tools])
        call = rules.name(f"{rules.literal(chr(10))} {body} {rules.literal(chr(10) + _CLOSE)}")
        return one_or_more(call, rules.literal(chr(10) + _OPEN), parallel=parallel)


class _Machine(JsonCallMachine):
    def run(self) -> Steps[None]:
        while True:
            self.opened((yield from self.until((_OPEN,), self.text)))
            try:
                yield from self._calls()
            except Malformed:
                if self.is_in_call:
                    yield from self.broken(_CLOSE)
                else:
                    self.not_a_call()

    def _calls(self) -> Steps[None]:
        """One object; several where a model leaves out the marks between them. A brace too many says nothing."""
        while True:
            try:
                yield from self.json_call()
            except Malformed:
                if not self.is_in_call or not self.has_arguments:
                    raise
                self.end()
            if (yield from self.may_follow(_CLOSE, skipping=SPACE + "}")):
                return
            self.opened("")
            self.put_back((yield from self.skip_space()))
