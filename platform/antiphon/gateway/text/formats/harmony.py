"""Harmony, gpt-oss's way: an answer is a row of messages, each in a channel and, if it is a call, with a recipient (request speed).

    <|channel|>analysis<|message|>...<|end|>                                                    a thought
    <|start|>assistant<|channel|>commentary<|message|>...<|end|>                                a preamble, for the reader
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>      a call, after which
                                                                                                the answer ends
    <|start|>assistant<|channel|>final<|message|>...<|return|>                                  the answer

The prompt ends in <|start|>assistant. The recipient may stand before the channel. Markers that end an answer are not in its text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import CallMachine, EndOfText, Rules, Steps, ThoughtMarkers
from antiphon.gateway.text.formats.json_calls import JsonCallMachine, any_of
from antiphon.gateway.text.parts import Part

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN, _END, _CALL, _RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)  # of a message; the last two only where its end was left out
_PREFIX = "functions."
_RECIPIENT = re.compile(r"to=(\S+)")
_FINAL = f"{_CHANNEL}final{_MESSAGE}"
_PREAMBLE = f"{_CHANNEL}commentary{_MESSAGE}"

HARMONY_THOUGHTS = ThoughtMarkers(
    name="harmony",
    start=f"{_CHANNEL}analysis{_MESSAGE}",
    end=_END,
    hint=f"{_CHANNEL}analysis",
    skipped=f"{_CHANNEL}analysis{_MESSAGE}{_END}{_START}assistant",
    efforts={"minimal": "low", "xhigh": "high", "max": "high"},
)


class HarmonyFormat:
    """See the module."""

    name = "harmony"
    markers = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN)
    opening: str | None = None

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return f"{_CHANNEL}analysis" in template or f"{_CHANNEL}commentary" in template

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``."""
        return _Machine(tools)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        between = f"{_CALL}{_START}assistant"
        return between.join(
            f"{_CHANNEL}commentary to={_PREFIX}{call.name} {_CONSTRAIN}json{_MESSAGE}{call.arguments or '{}'}" for call in calls
        )

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``. There is one call at most: the answer ends after it."""
        before = f"{_CHANNEL}commentary to={_PREFIX}%s {_CONSTRAIN}json{_MESSAGE}"
        each = [f"{rules.literal(before % tool.name)} {rules.arguments(tool)}" for tool in tools]
        return f"{self._begun(rules)} {rules.name(any_of(each))}"

    def final(self, expression: str, rules: Rules) -> str:
        """An expression of an answer to the reader that is ``expression``."""
        return f"{self._begun(rules)} {rules.literal(_FINAL)} {expression}"

    def _begun(self, rules: Rules) -> str:
        """What may come before the last message: preambles, and its beginning where another message was before it."""
        preamble = rules.name(f"{rules.literal(_PREAMBLE)} {rules.through(_END)} {rules.literal(f'{_START}assistant')}")
        return f"({rules.literal(f'{_START}assistant')})? ({preamble})*"


class _Machine(JsonCallMachine):
    """Reads all messages but a first thought, with tools or without."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._has_text = False
        self._has_thought = False
        self._is_new = False  # a message began, and has said nothing yet
        self._has_arguments = False
        super().__init__(tools)

    def run(self) -> Steps[None]:
        met = yield from self._opening()
        while True:
            role, channel = "", ""
            while met != _MESSAGE:
                header: list[str] = []
                before = met
                met = yield from self.until((_CHANNEL, _CONSTRAIN, _MESSAGE, _START), header.append)
                if before == _CHANNEL:
                    channel = "".join(header)
                elif before == _START:
                    role = "".join(header)
            recipient = _RECIPIENT.search(channel) or _RECIPIENT.search(role)
            if recipient is None:
                self._is_new = True
                self.is_thinking = channel.split(maxsplit=1)[:1] == ["analysis"]
                met = yield from self.until(_ENDS, self._thought if self.is_thinking else self._said)
                self.is_thinking = False
            else:
                met = yield from self._call(recipient[1].removeprefix(_PREFIX))
            while met in (_END, _CALL, _RETURN):
                met = yield from self.until((*_ENDS, _MESSAGE), self._drop)

    def finish(self, *, truncated: bool) -> list[Part]:
        """See ``CallMachine``. What ends a call ends the answer, too: one without arguments is whole then."""
        parts = super().finish(truncated=truncated)
        if self.is_in_call and not truncated and not self._has_arguments:
            self.arguments("{}")
            self.end()
            parts += self._take()
        return parts

    def _opening(self) -> Steps[str]:
        """The first marker. An answer that begins with none is text: a model may forget its channels."""
        read = ""
        try:
            while True:
                read += yield from self.next_char()
                begun = read.lstrip()
                if begun in (_START, _CHANNEL):
                    self._has_thought = begun == _START  # another message was before this one, and read elsewhere
                    return begun
                is_header = begun.startswith("to=") and "\n" not in begun
                if is_header and begun.endswith(_CHANNEL):
                    self.put_back(begun)
                    return _START
                if not is_header and not any(known.startswith(begun) for known in (_START, _CHANNEL, "to=")):
                    break
        except EndOfText:
            self.text(read)
            raise
        self._said(read)
        return (yield from self.until(_ENDS, self._said))

    def _call(self, name: str) -> Steps[str]:
        self._has_arguments = False
        self.begin(name)
        first = yield from self.skip_space()
        if first == "{":
            self._has_arguments = True
            yield from self.json_value(first, self.arguments)
            self.end()
            return (yield from self.until(_ENDS, self._drop))
        self.put_back(first)
        met = yield from self.until(_ENDS, self._argument)
        if not self._has_arguments:
            self.arguments("{}")
        self.end()
        return met

    def _argument(self, text: str) -> None:
        self._has_arguments = True
        self.arguments(text)

    def _said(self, text: str) -> None:
        if self._is_new and self._has_text:
            self.text("\n\n")
        self._is_new, self._has_text = False, True
        self.text(text)

    def _thought(self, text: str) -> None:
        if self._is_new and self._has_thought:
            self.thought("\n\n")
        self._is_new, self._has_thought = False, True
        self.thought(text)

    def _drop(self, text: str) -> None:
        """Between messages, and after a call's arguments, nothing is said."""
