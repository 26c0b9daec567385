"""Calls whose arguments are tags, one per parameter: Qwen3-Coder (and Step-3.5), GLM-4.5, Step-3 (request speed).

A parameter's value is given out whole, as JSON of the type that the tool's schema names: text stays text, whatever it looks like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.formats.base import CallMachine, Malformed, Rules, Steps, example_arguments, lark, one_or_more
from antiphon.gateway.text.formats.json_calls import any_of
from antiphon.gateway.text.formats.values import json_of, properties_of, read, spelling
from antiphon.gateway.text.schemas.refs import NOTES, Root

_NAME = re.compile(r"[^\s<>{}\"]+")


class TaggedFormat:
    """What these formats share; ``spell`` says how a family writes.

    ``call`` and ``parameter`` are texts around a name and a value: (before the name, after it, the end).
    """

    name = ""
    markers: tuple[str, ...] = ()
    opening: str | None = ""
    each_opening = ""  # of every call; the same as ``opening`` where nothing is around all calls
    call: tuple[str, str, str] = ("", "", "")
    ends: tuple[str, ...] = ()  # the marks of a call's end, in their order
    parameter: tuple[str, str, str] = ("", "", "")
    between = "\n"
    around = ("", "")  # all calls together
    trims_lines = False  # a value stands between line ends of its own
    hint = ""  # what a template of this format has

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return self.hint in template

    def machine(self, tools: Sequence[Tool]) -> CallMachine:
        """See ``CallFormat``."""
        return TaggedMachine(tools, self)

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See ``CallFormat``."""
        each = []
        for call in calls:
            text = self.call[0] + call.name + self.call[1]
            for key, value in example_arguments(call).items():
                shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                text += self.parameter[0] + key + self.parameter[1] + shown + self.parameter[2]
            each.append(text + self.call[2])
        return self.around[0] + self.between.join(each) + self.around[1]

    def grammar(self, tools: Sequence[Tool], rules: Rules, *, parallel: bool) -> str:
        """See ``CallFormat``."""
        call = rules.name(any_of([self._call(tool, rules) for tool in tools]))
        calls = one_or_more(call, rules.literal(self.between + self.each_opening), parallel=parallel)
        before = "" if self.opening == self.each_opening else rules.literal(self.each_opening)
        after = rules.literal(self.around[1]) if self.around[1] else ""
        return f"{before} {calls} {after}"

    def _call(self, tool: Tool, rules: Rules) -> str:
        check_can_be_held(tool)
        needed = tool.parameters.get("required") or ()
        parts = [rules.literal(self.call[0].removeprefix(self.each_opening) + tool.name + self.call[1])]
        for key, schema in properties_of(tool).items():
            before = rules.literal(self.parameter[0] + key + self.parameter[1])
            part = f"{before} {self._value(tool, schema, rules)}"
            parts.append(part if key in needed else f"({part})?")
        return " ".join([*parts, rules.literal(self.call[2])])

    def _value(self, tool: Tool, schema: object, rules: Rules) -> str:
        end = self.parameter[2]
        if tool.grammar is not None:
            return f"{lark(tool.grammar)} {rules.literal(end)}"
        spelled = spelling(schema, Root(tool.parameters), is_strict=tool.strict)
        if isinstance(spelled, list) and spelled:
            texts = [v if isinstance(v, str) else json.dumps(v) for v in spelled]
            return f"{any_of([rules.literal(text) for text in texts])} {rules.literal(end)}"
        if spelled == "text":
            return rules.until(end)
        return f"{rules.json(by_itself(schema, tool.parameters), is_strict=tool.strict)} {rules.literal(end)}"


def check_can_be_held(tool: Tool) -> None:
    """Parameters by themselves are held to their schemas, not several together.

    Raises:
        InvalidInput: the tool is strict, and its schema says more of its arguments than their names and each one's schema.
    """
    if not tool.strict:
        return
    for word, value in tool.parameters.items():
        if word not in NOTES and word not in ("type", "properties", "required", "additionalProperties", "patternProperties"):
            raise InvalidInput(f"{tool.field}: {word} of all arguments together can't be held in this model's calls", tool.field)
        missing = [name for name in value if name not in properties_of(tool)] if word == "required" and value else []
        if missing:
            raise InvalidInput(f"{tool.field}.required: {str(missing[0])[:128]!r} is not among the properties", tool.field)


def by_itself(schema: object, whole: Mapping[str, Any]) -> Mapping[str, Any] | bool:
    """A parameter's schema, in which references lead where they led in the whole."""
    if not isinstance(schema, Mapping):
        return schema if isinstance(schema, bool) else True
    definitions = {word: whole[word] for word in ("$defs", "definitions") if isinstance(whole.get(word), Mapping)}
    if not any(_leads_to_whole(part) for part in (schema, definitions)):
        return {**schema, **definitions}
    name = "whole"
    while name in definitions.get("$defs", {}):
        name += "-"
    moved = {"$defs": {**definitions.get("$defs", {}), name: {k: v for k, v in whole.items() if k not in definitions}}}
    found: Mapping[str, Any] = _moved({**schema, **definitions, **moved}, f"#/$defs/{name}")
    return found


_DEFINED = ("#/$defs/", "#/definitions/")


def _leads_to_whole(value: object) -> bool:
    if isinstance(value, Mapping):
        reference = value.get("$ref")
        if isinstance(reference, str) and reference.startswith("#") and not reference.startswith(_DEFINED):
            return True
        return any(map(_leads_to_whole, value.values()))
    return isinstance(value, list) and any(map(_leads_to_whole, value))


def _moved(value: Any, to: str) -> Any:
    """With references to the whole as references to where it is now."""
    if isinstance(value, Mapping):
        made = {key: _moved(inner, to) for key, inner in value.items()}
        reference = made.get("$ref")
        if isinstance(reference, str) and reference.startswith("#") and not reference.startswith(_DEFINED):
            made["$ref"] = to + reference[1:]
        return made
    return [_moved(inner, to) for inner in value] if isinstance(value, list) else value


class TaggedMachine(CallMachine):
    """Reads any of them."""

    def __init__(self, tools: Sequence[Tool], form: TaggedFormat) -> None:
        self._form = form
        super().__init__(tools)

    def run(self) -> Steps[None]:
        """See ``CallMachine``."""
        form = self._form
        opening = form.each_opening
        while True:
            met = yield from self.until(tuple(filter(None, (opening, form.around[0]))), self.text)
            if met != opening:
                continue  # what is around all calls says nothing
            self.opened(met)
            try:
                yield from self._read_spelled(form.call[0].removeprefix(opening))
                yield from self._call()
            except Malformed:
                self.not_a_call()

    def _call(self) -> Steps[None]:
        """A call's name and parameters. White space between marks, and the last of several closing marks, may be missing."""
        form = self._form
        before_key, after_key = form.parameter[0].strip(), form.parameter[1].split("\n")
        self.put_back((yield from self.skip_space()))
        name: list[str] = []
        met = yield from self.until((form.call[1].strip() or "\n", before_key, *form.ends), name.append)
        tool_name = "".join(name).strip()
        if _NAME.fullmatch(tool_name) is None:
            raise Malformed
        self.begin(tool_name)
        num_given = 0
        while met not in form.ends:
            if met == before_key:
                key: list[str] = []
                give = key.append
                for mark in filter(None, after_key):
                    yield from self.until((mark,), give)
                    give = self.drop
                value: list[str] = []
                yield from self.until((form.parameter[2].strip(),), value.append)
                name_of = "".join(key).strip()
                text = self._typed(tool_name, name_of, "".join(value))
                self.arguments(("{" if not num_given else ", ") + json.dumps(name_of, ensure_ascii=False) + ": " + text)
                num_given += 1
            met = yield from self.until((before_key, *form.ends), self.drop)
        self.arguments("}" if num_given else "{}")
        self.end()
        for mark in filter(None, (*form.ends[form.ends.index(met) + 1 :], form.around[1])):
            yield from self.may_follow(mark)

    def _read_spelled(self, text: str) -> Steps[None]:
        """``text`` with any white space at its line ends."""
        for line in filter(None, (piece.strip() for piece in text.split("\n"))):
            self.put_back((yield from self.skip_space()))
            yield from self.expect(line)

    def _typed(self, tool: str, key: str, raw: str) -> str:
        if self._form.trims_lines:
            raw = raw.removeprefix("\n").removesuffix("\n")
        known = self.tools.get(tool)
        if known is None:
            return json_of(raw, None, {})
        schema = properties_of(known).get(key)
        return read(raw, schema, Root(known.parameters), known.parameters, is_strict=known.strict)

    def drop(self, text: str) -> None:
        """What is between parameters says nothing."""


class Qwen3CoderFormat(TaggedFormat):
    """Qwen3-Coder; Step-3.5 writes the same."""

    name = "qwen3_coder"
    markers = ("<tool_call>", "</tool_call>")
    opening: str | None = "<tool_call>"
    each_opening = "<tool_call>"
    call = ("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>")
    ends = ("</function>", "</tool_call>")
    parameter = ("<parameter=", ">\n", "\n</parameter>\n")
    trims_lines = True
    hint = "<function="

    def detect(self, template: str) -> bool:
        """See ``CallFormat``."""
        return self.hint in template and "<tool_call>" in template


class GlmFormat(TaggedFormat):
    """GLM-4.5 and later."""

    name = "glm"
    markers = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    opening: str | None = "<tool_call>"
    each_opening = "<tool_call>"
    call = ("<tool_call>", "\n", "</tool_call>")
    ends = ("</tool_call>",)
    parameter = ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
    hint = "<arg_key>"


class Step3Format(TaggedFormat):
    """Step-3."""

    name = "step3"
    markers = (
        "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>", "<｜tool_sep｜>"
    )  # fmt: skip
    opening: str | None = "<｜tool_calls_begin｜>"
    each_opening = "<｜tool_call_begin｜>"
    call = (
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="', '">', "</steptml:invoke><｜tool_call_end｜>"
    )  # fmt: skip
    ends = ("</steptml:invoke>", "<｜tool_call_end｜>")
    parameter = ('<steptml:parameter name="', '">', "</steptml:parameter>")
    between = ""
    around = ("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>")
    hint = "steptml:invoke"
