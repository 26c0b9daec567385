"""DeepSeek: V3 and R1 fence the arguments after the name, V3.1 writes both plainly, between full-width markers (request speed)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import SPACE, CallMachine, Malformed, Rules, Steps, example_arguments, one_or_more
from antiphon.gateway.text.formats.json_calls import JsonCallMachine, any_of

_ALL, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _ONE_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json\n", "\n```"


class DeepSeekV31Format:
    """V3.1 and later."""

    name = "deepseek_v31"
    markers = (_ALL, _ALL_END, _ONE, _ONE_END, _SEP)
    opening: str | None = _ALL

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _ALL in template and _FENCE.strip() not in template

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``; one machine reads both."""
        return _Machine(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        each = (self.before(call.name) + json.dumps(example_arguments(call), ensure_ascii=False) + self.after for call in calls)
        return _ALL + self.between.join(each) + _ALL_END

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        each = [f"{rules.literal(self.before(t.name))} {rules.arguments(t)} {rules.literal(self.after)}" for t in tools]
        calls = one_or_more(rules.name(any_of(each)), rules.literal(self.between), parallel=parallel)
        return f"{calls} {rules.literal(_ALL_END)}"

    between = ""
    after = _ONE_END

    def before(self, name: str) -> str:
        """What comes before a call's arguments."""
        return f"{_ONE}{name}{_SEP}"


class DeepSeekV3Format(DeepSeekV31Format):
    """V3 and R1."""

    name = "deepseek_v3"
    between = "\n"
    after = _FENCE_END + _ONE_END

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return _ALL in template and _FENCE.strip() in template

    def before(self, name: str) -> str:
        """What comes before a call's arguments."""
        return f"{_ONE}function{_SEP}{name}\n{_FENCE}"


class _Machine(JsonCallMachine):
    def run(self) -> Steps[None]:
        while True:
            self.opened((yield from self.until((_ALL,), self.text)))
            try:
                while (yield from self._call()):
                    pass
                self.was_empty()
            except Malformed:
                if self.is_in_call:
                    yield from self.until((_ONE_END,), self.arguments)
                    self.end()
                else:
                    self.not_a_call()

    def _call(self) -> Steps[bool]:
        marker = yield from self.until((_ONE, _ALL_END), self.refuse)
        if marker == _ALL_END:
            return False
        name: list[str] = []
        yield from self.until((_SEP,), name.append)
        called = "".join(name).strip()
        first = yield from self.skip_space()
        if called == "function" and first not in "{<":
            self.put_back(first)
            name = []
            yield from self.until(("\n",), name.append)
            called = "".join(name).strip()
            first = yield from self.skip_space()
            if first == "`":
                self.put_back(first)
                yield from self.expect(_FENCE.strip())
                first = yield from self.skip_space()
        if not called:
            raise Malformed
        if first == "{":
            self.begin(called)
            yield from self.json_value(first, self.arguments)
        else:
            said: list[str] = []
            self.put_back(first)
            yield from self.until((_ONE_END,), said.append)
            if "".join(said).strip(SPACE + "`") not in ("", "null"):
                self.put_back("".join(said) + _ONE_END)
                raise Malformed
            self.put_back(_ONE_END)
            self.begin(called)
            self.arguments("{}")
        self.end()
        yield from self.until((_ONE_END,), self.drop)
        return True

    def refuse(self, text: str) -> None:
        """Between calls there is nothing but white space."""
        if text not in SPACE:
            raise Malformed

    def drop(self, text: str) -> None:
        """A fence's end says nothing."""
